"""The clipped loss, the epochs of minibatches, and the learning rate."""

from __future__ import annotations

import copy
import math
import shutil

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box

import walker_core as core

THREE = Box(-np.inf, np.inf, (3,), np.float32)
TWO = Box(-1, 1, (2,), np.float32)

METRICS = (*core.LOSS_METRICS, "grad_norm")
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA here")


def numbered(rows: int) -> torch.Tensor:
    """Random observations, the first number of each being its row, in thousandths."""
    obs = torch.randn(rows, 3)
    obs[:, 0] = torch.arange(rows) / 1000
    return obs


def random_batch(rows: int = 40, dtype=torch.float32, seed: int = 0) -> core.Batch:
    """Actions and logprobs that fit no policy exactly."""
    torch.manual_seed(seed)
    obs = numbered(rows)
    actions, logprobs = torch.randn(rows, 2), -2.5 + 0.3 * torch.randn(rows)
    rest = torch.randn(3, rows)
    return core.Batch(*(tensor.to(dtype) for tensor in (obs, actions, logprobs, *rest)))


def of_policy(agent: core.ActorCritic, rows: int = 300) -> core.Batch:
    """A batch that `agent` could have collected, in which an action's first number is what pays."""
    obs = numbered(rows)
    with torch.no_grad():
        actions, logprobs = agent.act(obs)
        values = agent.value(obs)
    advantages = (actions[:, 0] - actions[:, 0].mean()) / actions[:, 0].std()
    return core.Batch(obs, actions, logprobs, values, advantages, 2 + obs[:, 1])


def numpy_loss(batch, logprobs, entropy, values, config) -> tuple[float, list[float]]:
    """The loss row by row, as the paper's text says it, and its metrics."""
    policy, value, kl, clipped = [], [], [], []
    for i in range(len(logprobs)):
        difference = float(logprobs[i]) - float(batch.logprobs[i])
        ratio, advantage = math.exp(difference), float(batch.advantages[i])
        bound = 1 + config.clip_eps if advantage > 0 else 1 - config.clip_eps
        is_past = ratio > bound if advantage > 0 else ratio < bound
        policy.append(-(bound if is_past else ratio) * advantage)
        value.append((float(values[i]) - float(batch.returns[i])) ** 2 / 2)
        kl.append(ratio - 1 - difference)
        clipped.append(not 1 - config.clip_eps <= ratio <= 1 + config.clip_eps)
    metrics = [float(np.mean(x)) for x in (policy, value, entropy, kl, clipped)]
    loss = metrics[0] + config.value_coef * metrics[1] - config.entropy_coef * metrics[2]
    return loss, metrics


def std(agent: core.ActorCritic) -> torch.Tensor:
    """Of each action, where it does not depend on the observation."""
    return agent.distribution(torch.zeros(1, 3)).stddev[0].detach().clone()


class Spy(core.ActorCritic):
    """Notes every minibatch: its row numbers, and what the networks said of them then."""

    def __init__(self, config: core.Config) -> None:
        super().__init__(THREE, TWO, config)
        self.rows, self.said = [], []

    def evaluate_actions(self, obs, actions):
        logprobs, entropy = super().evaluate_actions(obs, actions)
        with torch.no_grad():
            self.said.append((logprobs.clone(), entropy.clone(), self.value(obs)))
        self.rows.append((1000 * obs[:, 0]).round().long().tolist())
        return logprobs, entropy

    def epochs(self, config: core.Config) -> list[list[list[int]]]:
        """The row numbers of each minibatch of each epoch."""
        parts = config.num_minibatches
        assert len(self.rows) % parts == 0
        return [self.rows[i : i + parts] for i in range(0, len(self.rows), parts)]


def make(optimizer=torch.optim.SGD, **settings) -> tuple[Spy, torch.optim.Optimizer, core.Config]:
    torch.manual_seed(1)
    defaults = {"num_envs": 4, "rollout_steps": 12, "minibatch_size": 10, "lr_schedule": "constant"}
    config = core.Config(**{**defaults, **settings})
    agent = Spy(config)
    rate = torch.tensor(config.learning_rate)
    return agent, optimizer(agent.parameters(), rate), config


def flat(agent: core.ActorCritic) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in agent.parameters()]).clone()


# ---- the loss ------------------------------------------------------------------------------------


def loss_inputs(seed: int):
    """Random logprobs, entropies and values, with ratios on both sides of both clips."""
    batch = random_batch(64, torch.float64, seed)
    shift = 0.4 * torch.randn(64, dtype=torch.float64)
    others = torch.rand(64, dtype=torch.float64), torch.randn(64, dtype=torch.float64)
    return batch, (batch.logprobs + shift, *others)


CONFIG = core.Config(clip_eps=0.2, value_coef=0.7, entropy_coef=0.03)


@pytest.mark.parametrize("seed", range(5))
def test_the_loss_and_its_metrics_are_those_of_an_independent_formula(seed):
    batch, inputs = loss_inputs(seed)
    loss, metrics = core.ppo_loss(batch, *inputs, CONFIG)
    expected, expected_metrics = numpy_loss(batch, *(x.numpy() for x in inputs), CONFIG)
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    np.testing.assert_allclose(metrics, expected_metrics, rtol=1e-12)
    assert 0.2 < metrics[core.LOSS_METRICS.index("clip_fraction")] < 0.9


@pytest.mark.parametrize("seed", range(5))
def test_the_gradient_is_that_of_finite_differences_inside_and_outside_the_clip(seed):
    batch, inputs = loss_inputs(seed)
    inputs = tuple(x.requires_grad_() for x in inputs)
    gradients = torch.autograd.grad(core.ppo_loss(batch, *inputs, CONFIG)[0], inputs)
    arrays, h = [x.detach().numpy() for x in inputs], 1e-6
    for which, gradient in enumerate(gradients):
        slopes = []
        for i in range(64):
            ends = []
            for sign in (1, -1):
                moved = [array.copy() for array in arrays]
                moved[which][i] += sign * h
                ends.append(numpy_loss(batch, *moved, CONFIG)[0])
            slopes.append((ends[0] - ends[1]) / (2 * h))
        np.testing.assert_allclose(gradient, slopes, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [
        (1.5, 1.0, 0.0),  # better, and moved far already: no more
        (1.5, -1.0, 1.5),  # worse, but moved the wrong way: back
        (0.5, -1.0, 0.0),
        (0.5, 1.0, -0.5),
        (1.1, 1.0, -1.1),
        (0.9, -1.0, 0.9),
    ],
)
def test_a_clipped_sample_gives_no_policy_gradient_and_any_other_does(ratio, advantage, slope):
    one = torch.ones(1, dtype=torch.float64)
    batch = core.Batch(one[:, None], one[:, None], -one, one, advantage * one, one)
    logprobs = (math.log(ratio) - one).requires_grad_()
    core.ppo_loss(batch, logprobs, one, one, CONFIG)[0].backward()
    np.testing.assert_allclose(logprobs.grad, [slope], rtol=1e-12)


def test_metrics_carry_no_gradient_and_the_loss_does():
    batch, inputs = loss_inputs(0)
    loss, metrics = core.ppo_loss(batch, *(x.requires_grad_() for x in inputs), CONFIG)
    assert loss.requires_grad
    assert not metrics.requires_grad


# ---- the update ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [48, 47, 41, 33, 25])
def test_each_epoch_uses_every_row_once_in_so_many_near_equal_minibatches(rows):
    agent, optimizer, config = make(update_epochs=3)
    assert config.num_minibatches == 4  # 48 // 10
    core.update(agent, optimizer, random_batch(rows), config)
    assert len(agent.epochs(config)) == 3
    for minibatches in agent.epochs(config):
        assert sorted(np.concatenate(minibatches)) == list(range(rows))
        sizes = [len(minibatch) for minibatch in minibatches]
        assert len(sizes) == 4
        assert max(sizes) - min(sizes) <= 1


def test_each_epoch_shuffles_afresh():
    agent, optimizer, config = make(update_epochs=5)
    core.update(agent, optimizer, random_batch(48), config)
    orders = {tuple(np.concatenate(minibatches)) for minibatches in agent.epochs(config)}
    assert len(orders) == 5
    assert tuple(range(48)) not in orders


def test_metrics_are_averages_over_all_minibatches_of_all_epochs():
    agent, optimizer, config = make(update_epochs=4, entropy_coef=0.1, learning_rate=0.1)
    batch = random_batch(43)
    found = core.update(agent, optimizer, batch, config)
    expected = []
    for rows, said in zip(agent.rows, agent.said, strict=True):
        minibatch = core.Batch(*(tensor[rows] for tensor in batch))
        expected.append(numpy_loss(minibatch, *(x.numpy() for x in said), config)[1])
    for i, name in enumerate(core.LOSS_METRICS):
        column = np.array(expected)[:, i]
        np.testing.assert_allclose(found[name], column.mean(), rtol=1e-4, atol=1e-7)
        assert column.std() > 0  # so that any one of them would not do


def test_the_gradient_norm_that_is_logged_is_the_one_before_clipping():
    agent, optimizer, config = make(minibatch_size=48, update_epochs=1, max_grad_norm=1e-3)
    batch = random_batch(48)
    logprobs, entropy = agent.evaluate_actions(batch.obs, batch.actions)
    loss, _ = core.ppo_loss(batch, logprobs, entropy, agent.value(batch.obs), config)
    gradients = torch.autograd.grad(loss, list(agent.parameters()))
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
    assert norm > 0.1
    found = core.update(agent, optimizer, batch, config)["grad_norm"]
    np.testing.assert_allclose(found, norm, rtol=1e-4)


@pytest.mark.parametrize("most", [1e-3, 1e3])
def test_a_step_goes_no_further_than_the_clipped_gradient(most):
    agent, optimizer, config = make(
        minibatch_size=48, update_epochs=1, max_grad_norm=most, learning_rate=0.5
    )
    before = flat(agent)
    found = core.update(agent, optimizer, random_batch(48), config)
    moved = (flat(agent) - before).norm()  # plain SGD: rate × gradient
    np.testing.assert_allclose(moved, 0.5 * min(found["grad_norm"], most), rtol=1e-3)


def test_an_update_is_one_clipped_gradient_step_for_each_minibatch():
    settings = {"max_grad_norm": 0.3, "learning_rate": 0.2, "update_epochs": 2}
    agent, optimizer, config = make(entropy_coef=0.1, **settings)
    batch, again = random_batch(43), copy.deepcopy(agent)
    core.update(agent, optimizer, batch, config)
    parameters = list(again.parameters())
    for rows in list(agent.rows):
        minibatch = core.Batch(*(tensor[rows] for tensor in batch))
        logprobs, entropy = again.evaluate_actions(minibatch.obs, minibatch.actions)
        values = again.value(minibatch.obs)
        loss, _ = core.ppo_loss(minibatch, logprobs, entropy, values, config)
        gradients = torch.autograd.grad(loss, parameters)
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= 0.2 * gradient * min(1.0, 0.3 / norm)
    torch.testing.assert_close(flat(agent), flat(again), rtol=1e-4, atol=1e-5)


def test_target_kl_ends_the_update_after_the_first_epoch_past_one_and_a_half_times_it():
    def run(target):
        settings = {"update_epochs": 12, "learning_rate": 1e-4, "target_kl": target}
        agent, optimizer, config = make(torch.optim.Adam, **settings)
        batch = of_policy(agent)
        core.update(agent, optimizer, batch, config)
        kls = []
        for rows, (logprobs, _, _) in zip(agent.rows, agent.said, strict=True):
            log_ratio = (logprobs - batch.logprobs[rows]).double().numpy()
            kls.append(np.mean(np.exp(log_ratio) - 1 - log_ratio))
        return np.reshape(kls, (-1, config.num_minibatches)).mean(1)

    free = run(None)
    assert len(free) == 12
    target = 0.99 * free[6] / 1.5
    last = int(np.argmax(free > 1.5 * target))
    assert any(target < kl for kl in free[:last])  # past the target itself, but not far enough
    np.testing.assert_array_equal(run(target), free[: last + 1])


def test_adaptive_rate_goes_up_below_half_the_target_and_down_above_twice():
    def adapted(kl, rate=1e-3):
        groups = [{"lr": torch.tensor(rate), "params": torch.zeros(1)} for _ in range(2)]
        optimizer = torch.optim.SGD(groups)
        core.adapt_learning_rates(optimizer, torch.tensor(kl), desired_kl=0.01)
        assert groups[0]["lr"] == groups[1]["lr"]
        return float(groups[0]["lr"])

    for kl in (1e-6, 0.0049):
        np.testing.assert_allclose(adapted(kl), 1.5e-3, rtol=1e-6)
    for kl in (0.0201, 5.0):
        np.testing.assert_allclose(adapted(kl), 1e-3 / 1.5, rtol=1e-6)
    for kl in (0.0, 0.0051, 0.01, 0.0199):
        np.testing.assert_allclose(adapted(kl), 1e-3, rtol=1e-7)
    np.testing.assert_allclose([adapted(1.0, 1.1e-5), adapted(1e-4, 9e-3)], [1e-5, 1e-2], rtol=1e-6)


def test_the_adaptive_schedule_follows_the_kl_of_each_minibatch_and_no_other_does():
    for kl, factor in ((1e9, 1.5), (1e-9, 1 / 1.5)):  # every KL is far below, or far above
        agent, optimizer, config = make(
            lr_schedule="adaptive", desired_kl=kl, update_epochs=1, learning_rate=1e-3
        )
        found = core.update(agent, optimizer, random_batch(), config)
        np.testing.assert_allclose(found["learning_rate"], 1e-3 * factor**4, rtol=1e-5)
        np.testing.assert_allclose(optimizer.param_groups[0]["lr"], 1e-3 * factor**4, rtol=1e-5)
    for schedule in ("constant", "linear", "cosine"):
        agent, optimizer, config = make(lr_schedule=schedule, learning_rate=1e-3)
        found = core.update(agent, optimizer, random_batch(), config)
        np.testing.assert_allclose(found["learning_rate"], 1e-3, rtol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        ("constant", [1, 1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0, 0]),
        ("cosine", [1, (1 + math.sqrt(0.5)) / 2, 0.5, 0, 0]),
    ],
)
def test_a_schedule_is_a_function_of_the_absolute_step(schedule, values):
    config = core.Config(lr_schedule=schedule, total_timesteps=10_000)
    firsts, found = [2e-3, 7e-4], []
    groups = [{"params": torch.zeros(1), "lr": torch.zeros(()), "initial_lr": x} for x in firsts]
    for step in (0, 2500, 5000, 10_000, 11_000):
        core.schedule_learning_rates(torch.optim.SGD(groups), config, step)
        found.append([float(group["lr"]) for group in groups])
    np.testing.assert_allclose(found, np.outer(values, firsts), rtol=1e-6, atol=1e-18)


def test_the_adaptive_schedule_knows_no_step():
    groups = [{"params": torch.zeros(1), "lr": torch.tensor(0.5), "initial_lr": 1.0}]
    config = core.Config(lr_schedule="adaptive")
    core.schedule_learning_rates(torch.optim.SGD(groups), config, 1000)
    assert groups[0]["lr"] == 0.5


def test_explained_variance_is_the_share_that_the_old_values_explained():
    agent, optimizer, config = make()
    batch = random_batch(48)
    targets = batch.returns.double().numpy()
    for values in (batch.values, batch.returns + 7, torch.zeros(48), 0.5 * batch.returns):
        found = core.update(agent, optimizer, batch._replace(values=values), config)
        share = 1 - np.var(targets - values.double().numpy()) / np.var(targets)
        np.testing.assert_allclose(found["explained_variance"], share, atol=1e-5)


def test_the_action_std_that_is_logged_is_the_policys_now():
    agent, optimizer, config = make(learning_rate=0.1)
    found = core.update(agent, optimizer, random_batch(), config)
    std = np.log1p(np.exp(agent.raw_std.detach().numpy())).mean()
    np.testing.assert_allclose(found["action_std"], std, rtol=1e-6)
    assert abs(std - 1) > 1e-4


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler here")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
def test_a_compiled_update_is_the_eager_one(device):
    found = []
    for compiled in (False, True):
        agent, optimizer, config = make(learning_rate=0.1, compile=compiled)
        agent = core.ActorCritic.to(agent, device)
        agent.__class__ = core.ActorCritic  # a spy's notes cannot be compiled
        batch = core.Batch(*(tensor.to(device) for tensor in random_batch()))
        torch.manual_seed(2)
        for rows in (48, 41, 37):  # other numbers of valid rows
            part = core.Batch(*(tensor[:rows] for tensor in batch))
            metrics = core.update(agent, optimizer, part, config)
        found.append((flat(agent).cpu(), metrics))
    (eager, said), (compiled, also) = found
    torch.testing.assert_close(eager, compiled, rtol=1e-4, atol=1e-5)
    assert also == pytest.approx(said, rel=1e-3, abs=1e-5)


def test_an_update_moves_every_parameter_and_improves_both_losses_on_the_batch():
    agent, optimizer, config = make(torch.optim.Adam, minibatch_size=12, learning_rate=3e-3)
    batch = of_policy(agent)

    def losses():
        logprobs, entropy = agent.evaluate_actions(batch.obs, batch.actions)
        return core.ppo_loss(batch, logprobs, entropy, agent.value(batch.obs), config)[1][:2]

    before, parameters = losses(), [p.detach().clone() for p in agent.parameters()]
    mean = agent.mean_action(batch.obs)[:, 0].mean()
    core.update(agent, optimizer, batch, config)
    assert all(not torch.equal(p, q) for p, q in zip(agent.parameters(), parameters, strict=True))
    assert torch.all(losses() < before - 0.01)
    assert agent.mean_action(batch.obs)[:, 0].mean() > mean + 0.05  # towards what pays


@pytest.mark.parametrize(("coefficient", "grows"), [(1.0, True), (0.0, False)])
def test_the_entropy_bonus_widens_the_policy_and_its_absence_does_not(coefficient, grows):
    agent, optimizer, config = make(entropy_coef=coefficient, learning_rate=0.1)
    batch = random_batch()._replace(advantages=torch.zeros(40))
    before = std(agent)
    core.update(agent, optimizer, batch, config)
    assert bool(torch.all(std(agent) > before)) is grows
    assert bool(torch.equal(std(agent), before)) is not grows
