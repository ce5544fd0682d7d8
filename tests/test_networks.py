"""The two networks and the Gaussian policy."""

import math

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from torch import nn

import walker_core as core

SIX = Box(-np.inf, np.inf, (6,), np.float32)
TWO = Box(-1, 1, (2,), np.float32)


def make(**settings) -> core.ActorCritic:
    torch.manual_seed(0)
    return core.ActorCritic(SIX, TWO, core.Config(**settings))


def std(agent: core.ActorCritic) -> torch.Tensor:
    """Of each action, where it does not depend on the observation."""
    return agent.distribution(torch.zeros(1, 6)).stddev[0].detach()


def linears(layers: nn.Module) -> list[nn.Linear]:
    return [layer for layer in layers if isinstance(layer, nn.Linear)]


def test_actor_and_critic_have_the_sizes_of_the_config():
    agent = make(actor_hidden=(32, 16), critic_hidden=(8, 7, 5))
    shapes = [[tuple(layer.weight.shape) for layer in linears(net)] for net in agent.children()]
    assert shapes == [[(32, 6), (16, 32), (2, 16)], [(8, 6), (7, 8), (5, 7), (1, 5)]]
    obs = torch.randn(4, 6)
    assert agent.value(obs).shape == (4,)
    assert agent.mean_action(obs).shape == agent.act(obs)[0].shape == (4, 2)


def layer_norm(x: torch.Tensor) -> torch.Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize("normed", [False, True])
def test_the_networks_are_their_layers_in_order_with_norm_and_activation(normed):
    agent = make(layer_norm=normed, actor_hidden=(4, 4), critic_hidden=(5,))
    obs = torch.randn(9, 6)
    for net, found in ((agent.actor, agent.mean_action(obs)), (agent.critic, agent.value(obs))):
        *hidden, last = linears(net)
        x = obs
        for layer in hidden:
            x = nn.functional.silu(layer_norm(layer(x)) if normed else layer(x))
        torch.testing.assert_close(found, last(x).squeeze(-1))


def test_actor_and_critic_share_nothing():
    agent = make()
    agent.value(torch.randn(3, 6)).sum().backward()
    assert all(parameter.grad is None for parameter in (*agent.actor.parameters(), agent.raw_std))
    assert all(parameter.grad is not None for parameter in agent.critic.parameters())


def test_weights_are_orthogonal_with_their_gains_and_biases_are_zero():
    agent = make(actor_hidden=(32, 16), critic_hidden=(8, 5))
    for net, out_gain in ((agent.actor, 0.01), (agent.critic, 1.0)):
        *hidden, last = linears(net)
        for layer, gain in [*((layer, math.sqrt(2)) for layer in hidden), (last, out_gain)]:
            weight = layer.weight.detach().double()
            rows, columns = weight.shape
            gram = weight @ weight.T if rows <= columns else weight.T @ weight
            expected = gain**2 * torch.eye(min(rows, columns), dtype=torch.double)
            torch.testing.assert_close(gram, expected, rtol=0, atol=1e-5 * gain**2)
            assert not layer.bias.any()


@pytest.mark.parametrize("dependent", [False, True])
@pytest.mark.parametrize("init_std", [0.05, 1.0, 5.0])
def test_actions_start_with_the_std_of_the_config(init_std, dependent):
    agent = make(init_std=init_std, state_dependent_std=dependent)
    rel = 0.05 if dependent else 0.02  # there the network adds a little
    for obs in (torch.zeros(50_000, 6), torch.full((50_000, 6), 3.0)):
        actions, _ = agent.act(obs)
        np.testing.assert_allclose(actions.std(0), init_std, rtol=rel)
        mean = agent.mean_action(obs[0])
        torch.testing.assert_close(actions.mean(0), mean, atol=0.02 * init_std, rtol=0)


def test_a_state_dependent_std_learns_from_the_observation_and_another_does_not():
    for dependent in (False, True):
        agent = make(state_dependent_std=dependent)
        nn.init.normal_(agent.actor[-1].weight)
        spread = agent.distribution(torch.randn(5, 6)).stddev
        assert (len(spread.unique(dim=0)) == 5) is dependent


def test_mean_activation_tanh_keeps_the_mean_within_1():
    agent, obs = make(mean_activation="tanh"), torch.randn(5, 6)
    nn.init.normal_(agent.actor[-1].weight, std=3)
    torch.testing.assert_close(agent.mean_action(obs), agent.actor(obs).tanh())


def test_the_std_is_softplus_and_of_each_action_its_own():
    agent = make()
    with torch.no_grad():
        agent.raw_std.copy_(torch.tensor([-1.0, 2.0]))
    np.testing.assert_allclose(std(agent), np.log1p(np.exp([-1.0, 2.0])), rtol=1e-6)
    agent.evaluate_actions(torch.zeros(1, 6), torch.ones(1, 2))[0].sum().backward()
    assert agent.raw_std.grad.all()


def test_logprobs_and_entropies_are_those_of_the_closed_form_gaussian():
    agent = make(init_std=0.7)
    with torch.no_grad():
        agent.raw_std += torch.tensor([0.0, 0.4])
    obs, actions = torch.randn(20, 6), 3 * torch.randn(20, 2)
    logprobs, entropies = agent.evaluate_actions(obs, actions)
    mean, spread = agent.mean_action(obs).detach().double().numpy(), std(agent).numpy()
    z = (actions.numpy() - mean) / spread
    expected = (-0.5 * z**2 - np.log(spread) - 0.5 * np.log(2 * np.pi)).sum(1)
    np.testing.assert_allclose(logprobs.detach(), expected, rtol=1e-5)
    entropy = np.log(spread * np.sqrt(2 * np.pi * np.e)).sum()
    np.testing.assert_allclose(entropies.detach(), np.full(20, entropy), rtol=1e-6)
    actions, logprobs = agent.act(obs)
    torch.testing.assert_close(logprobs, agent.evaluate_actions(obs, actions)[0])


def test_the_mean_action_draws_no_random_numbers_and_a_sample_does():
    agent, obs = make(), torch.randn(5, 6)
    before = torch.get_rng_state()
    assert torch.equal(agent.mean_action(obs), agent.mean_action(obs))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(agent.act(obs)[0], agent.act(obs)[0])


def test_no_std_is_below_a_thousandth():
    agent = make()
    with torch.no_grad():
        agent.raw_std.fill_(-50.0)
    distribution = agent.distribution(torch.randn(4, 6))
    assert distribution.stddev.min() >= 0.001
    assert torch.isfinite(distribution.log_prob(distribution.mean)).all()
