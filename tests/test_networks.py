"""The two networks and the Gaussian policy."""

from __future__ import annotations

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

import walker_core as core

SIX = gym.spaces.Box(-np.inf, np.inf, (6,), np.float32)
TWO = gym.spaces.Box(-1, 1, (2,), np.float32)


def network(**settings) -> core.ActorCritic:
    torch.manual_seed(0)
    return core.ActorCritic(SIX, TWO, core.Config(**settings))


def std(agent: core.ActorCritic) -> torch.Tensor:
    """Of each action, where it does not depend on the observation."""
    return agent.distribution(torch.zeros(1, 6)).stddev[0]


def linears(layers: nn.Module) -> list[nn.Linear]:
    return [layer for layer in layers if isinstance(layer, nn.Linear)]


def test_actor_and_critic_have_the_sizes_that_were_asked_for():
    agent = network(actor_hidden=(32, 16), critic_hidden=(8, 7, 5))
    shapes = [[tuple(layer.weight.shape) for layer in linears(net)] for net in agent.children()]
    assert shapes == [[(32, 6), (16, 32), (2, 16)], [(8, 6), (7, 8), (5, 7), (1, 5)]]
    obs = torch.randn(4, 6)
    assert agent.value(obs).shape == (4,)
    assert agent.mean_action(obs).shape == (4, 2)


@pytest.mark.parametrize(
    ("name", "function"),
    [("tanh", torch.tanh), ("relu", torch.relu), ("elu", nn.ELU()), ("silu", nn.SiLU())],
)
def test_the_networks_are_their_layers_applied_in_order_with_the_activation(name, function):
    agent, obs = (
        network(activation=name, actor_hidden=(4, 4), critic_hidden=(5,)),
        torch.randn(9, 6),
    )
    first, second, last = linears(agent.actor)
    by_hand = last(function(second(function(first(obs)))))
    torch.testing.assert_close(agent.mean_action(obs), by_hand)
    first, last = linears(agent.critic)
    torch.testing.assert_close(agent.value(obs), last(function(first(obs)))[:, 0])


def test_layer_norm_stands_before_each_activation_where_asked_for():
    agent, obs = (
        network(layer_norm=True, activation="tanh", actor_hidden=(4, 3)),
        torch.randn(9, 6),
    )

    def normal(x):
        return (x - x.mean(-1, keepdim=True)) / (
            x.var(-1, correction=0, keepdim=True) + 1e-5
        ).sqrt()

    first, second, last = linears(agent.actor)
    by_hand = last(torch.tanh(normal(second(torch.tanh(normal(first(obs)))))))
    torch.testing.assert_close(agent.mean_action(obs), by_hand)
    assert not any(isinstance(m, nn.LayerNorm) for m in network(layer_norm=False).modules())


def test_actor_and_critic_share_nothing():
    agent = network()
    agent.value(torch.randn(3, 6)).sum().backward()
    assert all(parameter.grad is None for parameter in agent.actor.parameters())
    assert agent.raw_std.grad is None
    assert all(parameter.grad is not None for parameter in agent.critic.parameters())


def test_weights_are_orthogonal_with_their_gains_and_biases_are_zero():
    agent = network(actor_hidden=(32, 16), critic_hidden=(8, 5))
    for net, out_gain in ((agent.actor, 0.01), (agent.critic, 1.0)):
        *hidden, last = linears(net)
        for layer, gain in [*((layer, math.sqrt(2)) for layer in hidden), (last, out_gain)]:
            weight = layer.weight.detach().double()
            rows, columns = weight.shape
            gram = weight @ weight.T if rows <= columns else weight.T @ weight
            expected = gain**2 * torch.eye(min(rows, columns), dtype=torch.double)
            torch.testing.assert_close(gram, expected, rtol=0, atol=1e-5 * gain**2)
            assert not layer.bias.any()


@pytest.mark.parametrize("init_std", [0.05, 0.6, 1.0, 5.0])
def test_the_initial_std_is_the_one_asked_for_whatever_the_observation(init_std):
    agent = network(init_std=init_std)
    torch.testing.assert_close(std(agent).detach(), torch.full((2,), init_std))
    for obs in (torch.zeros(50_000, 6), torch.full((50_000, 6), 3.0)):
        actions, _ = agent.act(obs)
        np.testing.assert_allclose(actions.std(0), init_std, rtol=0.02)
        torch.testing.assert_close(
            actions.mean(0), agent.mean_action(obs[0]), atol=0.02 * init_std, rtol=0
        )


def test_the_std_learns_and_is_its_own_for_each_action():
    agent = network()
    with torch.no_grad():
        agent.raw_std.copy_(torch.tensor([-1.0, 2.0]))
    expected = np.log1p(np.exp([-1.0, 2.0]))  # softplus
    np.testing.assert_allclose(std(agent).detach(), expected, rtol=1e-6)
    agent.act(torch.zeros(1, 6))
    logprobs, _ = agent.evaluate_actions(torch.zeros(1, 6), torch.ones(1, 2))
    logprobs.sum().backward()
    assert agent.raw_std.grad.all()


def test_logprobs_and_entropies_are_those_of_the_closed_form_gaussian():
    agent = network(init_std=0.7)
    with torch.no_grad():
        agent.raw_std += torch.tensor([0.0, 0.4])
    obs, actions = torch.randn(20, 6), 3 * torch.randn(20, 2)
    logprobs, entropies = agent.evaluate_actions(obs, actions)
    mean, spread = agent.mean_action(obs).detach().double().numpy(), std(agent).detach().numpy()
    z = (actions.numpy() - mean) / spread
    expected = (-0.5 * z**2 - np.log(spread) - 0.5 * np.log(2 * np.pi)).sum(1)
    np.testing.assert_allclose(logprobs.detach(), expected, rtol=1e-5)
    entropy = np.log(spread * np.sqrt(2 * np.pi * np.e)).sum()
    np.testing.assert_allclose(entropies.detach(), np.full(20, entropy), rtol=1e-6)


def test_the_logprob_of_a_sample_is_that_of_the_same_action_evaluated():
    agent, obs = network(), torch.randn(30, 6)
    actions, logprobs = agent.act(obs)
    assert actions.shape == (30, 2)
    assert not actions.requires_grad
    torch.testing.assert_close(logprobs, agent.evaluate_actions(obs, actions)[0])


def test_the_mean_action_is_deterministic_and_a_sample_is_not():
    agent, obs = network(), torch.randn(5, 6)
    before = torch.get_rng_state()
    assert torch.equal(agent.mean_action(obs), agent.mean_action(obs))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(agent.act(obs)[0], agent.act(obs)[0])
