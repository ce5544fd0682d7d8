"""The clipped loss, the epochs of minibatches, and the learning rate."""

import copy
import math

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from helpers import tiny

import walker_core as core

THREE = Box(-np.inf, np.inf, (3,), np.float32)
TWO = Box(-1, 1, (2,), np.float32)
LOSS_METRICS = ("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction")


def numbered(rows: int) -> torch.Tensor:
    """Random observations, the first number of each being its row, in thousandths."""
    obs = torch.randn(rows, 3)
    obs[:, 0] = torch.arange(rows) / 1000
    return obs


def random_batch(rows: int = 48, dtype=torch.float32, seed: int = 0) -> core.Batch:
    """Actions and logprobs that fit no policy exactly."""
    torch.manual_seed(seed)
    obs = numbered(rows)
    actions, logprobs = torch.randn(rows, 2), -2.5 + 0.3 * torch.randn(rows)
    rest = torch.randn(3, rows)
    return core.Batch(*(tensor.to(dtype) for tensor in (obs, actions, logprobs, *rest)))


def batch_of(agent: core.ActorCritic, rows: int = 300) -> core.Batch:
    """A batch that `agent` could have collected, in which an action's first number is what pays."""
    obs = numbered(rows)
    with torch.no_grad():
        actions, logprobs = agent.act(obs)
        values = agent.value(obs)
    advantages = (actions[:, 0] - actions[:, 0].mean()) / actions[:, 0].std()
    return core.Batch(obs, actions, logprobs, values, advantages, 2 + obs[:, 1])


def slow_loss(batch, logprobs, entropy, values, config) -> tuple[float, dict]:
    """The loss row by row, as the paper's text has it, and its metrics."""
    columns = {name: [] for name in LOSS_METRICS}
    for i in range(len(logprobs)):
        difference = float(logprobs[i]) - float(batch.logprobs[i])
        ratio, advantage = math.exp(difference), float(batch.advantages[i])
        bound = 1 + config.clip_eps if advantage > 0 else 1 - config.clip_eps
        is_past = ratio > bound if advantage > 0 else ratio < bound
        value, old, target = float(values[i]), float(batch.values[i]), float(batch.returns[i])
        error = (value - target) ** 2
        if config.clip_value_eps is not None:
            near = min(max(value, old - config.clip_value_eps), old + config.clip_value_eps)
            error = max(error, (near - target) ** 2)
        columns["policy_loss"].append(-(bound if is_past else ratio) * advantage)
        columns["value_loss"].append(error / 2)
        columns["entropy"].append(float(entropy[i]))
        columns["approx_kl"].append(difference**2 / 2)
        columns["clip_fraction"].append(not 1 - config.clip_eps <= ratio <= 1 + config.clip_eps)
    metrics = {name: float(np.mean(column)) for name, column in columns.items()}
    loss = metrics["policy_loss"] + config.value_coef * metrics["value_loss"]
    return loss - config.entropy_coef * metrics["entropy"], metrics


class Spy(core.ActorCritic):
    """Notes the row numbers of every minibatch, and what the networks gave for them."""

    def __init__(self, config: core.Config) -> None:
        super().__init__(THREE, TWO, config)
        self.rows, self.outputs = [], []

    def evaluate_actions(self, obs, actions):
        logprobs, entropy = super().evaluate_actions(obs, actions)
        with torch.no_grad():
            self.outputs.append((logprobs.clone(), entropy.clone(), self.value(obs)))
        self.rows.append((1000 * obs[:, 0]).round().long().tolist())
        return logprobs, entropy


def make(optimizer=torch.optim.SGD, **settings):
    """An agent, its optimizer and its config: 48 rows, four minibatches an epoch."""
    torch.manual_seed(1)
    defaults = {"num_envs": 4, "rollout_steps": 12, "minibatch_size": 10, "lr_schedule": "constant"}
    config = core.Config(**{**defaults, **settings})
    agent = Spy(config)
    return agent, optimizer(agent.parameters(), config.learning_rate), config


def loss_of(agent: core.ActorCritic, batch: core.Batch, config: core.Config) -> tuple:
    """The loss and its metrics of the networks as they are."""
    logprobs, entropy = agent.evaluate_actions(batch.obs, batch.actions)
    return core.ppo_loss(batch, logprobs, entropy, agent.value(batch.obs), config)


def flat(agent: core.ActorCritic) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(agent.parameters()).detach().clone()


# ---- the loss ------------------------------------------------------------------------------------


def loss_inputs(seed: int):
    """Random logprobs, entropies and values, with ratios on both sides of both clips."""
    batch = random_batch(64, torch.float64, seed)
    shift = 0.4 * torch.randn(64, dtype=torch.float64)
    others = torch.rand(64, dtype=torch.float64), torch.randn(64, dtype=torch.float64)
    return batch, (batch.logprobs + shift, *others)


@pytest.mark.parametrize("clip_value_eps", [None, 0.5])
@pytest.mark.parametrize("seed", range(2))
def test_loss_metrics_and_gradient_are_those_of_a_slow_loop(seed, clip_value_eps):
    coefficients = {"clip_eps": 0.2, "value_coef": 0.7, "entropy_coef": 0.03}
    config = core.Config(**coefficients, clip_value_eps=clip_value_eps)
    batch, inputs = loss_inputs(seed)
    inputs = [x.requires_grad_() for x in inputs]
    loss, metrics = core.ppo_loss(batch, *inputs, config)
    arrays, h = [x.detach().numpy() for x in inputs], 1e-6
    expected, expected_metrics = slow_loss(batch, *arrays, config)
    np.testing.assert_allclose(loss.detach(), expected, rtol=1e-12)
    assert {name: x.item() for name, x in metrics.items()} == pytest.approx(expected_metrics)
    assert 0.2 < metrics["clip_fraction"] < 0.9
    assert not any(x.requires_grad for x in metrics.values())

    for which, gradient in enumerate(torch.autograd.grad(loss, inputs)):
        slopes = []
        for i in range(0, 64, 4):
            ends = []
            for sign in (1, -1):
                moved = [array.copy() for array in arrays]
                moved[which][i] += sign * h
                ends.append(slow_loss(batch, *moved, config)[0])
            slopes.append((ends[0] - ends[1]) / (2 * h))
        np.testing.assert_allclose(gradient[::4], slopes, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [
        (1.5, 1.0, 0.0),  # better, and moved far already: no more
        (1.5, -1.0, 1.5),  # worse, but moved the wrong way: back
        (0.5, -1.0, 0.0),
        (0.5, 1.0, -0.5),
        (1.1, 1.0, -1.1),
    ],
)
def test_a_clipped_sample_gives_no_policy_gradient_and_any_other_does(ratio, advantage, slope):
    one = torch.ones(1, dtype=torch.float64)
    batch = core.Batch(one[:, None], one[:, None], -one, one, advantage * one, one)
    logprobs = (math.log(ratio) - one).requires_grad_()
    core.ppo_loss(batch, logprobs, one, one, core.Config(clip_eps=0.2))[0].backward()
    np.testing.assert_allclose(logprobs.grad, [slope], rtol=1e-12)


# ---- the update ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [48, 41, 25])
def test_each_epoch_uses_every_row_once_in_near_equal_minibatches_freshly_shuffled(rows):
    agent, optimizer, config = make(update_epochs=3)
    core.update(agent, optimizer, random_batch(rows), config)
    assert config.num_minibatches == 4  # 48 // 10, whatever the number of valid rows
    epochs = [agent.rows[0:4], agent.rows[4:8], agent.rows[8:12]]
    assert len(agent.rows) == 12
    for minibatches in epochs:
        assert sorted(np.concatenate(minibatches)) == list(range(rows))
        sizes = [len(minibatch) for minibatch in minibatches]
        assert max(sizes) - min(sizes) <= 1
    orders = {tuple(np.concatenate(minibatches)) for minibatches in epochs}
    assert len(orders | {tuple(range(rows))}) == 4


def test_metrics_are_averages_over_all_minibatches_of_all_epochs():
    agent, optimizer, config = make(update_epochs=4, entropy_coef=0.1, learning_rate=0.1)
    batch = random_batch(43)
    found = core.update(agent, optimizer, batch, config)
    expected = []
    for rows, outputs in zip(agent.rows, agent.outputs, strict=True):
        arrays = (x.numpy() for x in outputs)
        expected.append(slow_loss(batch.select(torch.tensor(rows)), *arrays, config)[1])
    for name in LOSS_METRICS:
        column = np.array([metrics[name] for metrics in expected])
        np.testing.assert_allclose(found[name], column.mean(), rtol=1e-4, atol=1e-7)
        assert column.std() > 0  # so that any one of them would not do


def test_an_update_is_one_clipped_gradient_step_for_each_minibatch():
    """And the norm that is logged is the one before clipping."""
    settings = {"max_grad_norm": 0.3, "learning_rate": 0.2, "update_epochs": 2}
    agent, optimizer, config = make(entropy_coef=0.1, **settings)
    batch, again, norms = random_batch(43), copy.deepcopy(agent), []
    found = core.update(agent, optimizer, batch, config)
    parameters = list(again.parameters())
    for rows in agent.rows:
        loss, _ = loss_of(again, batch.select(torch.tensor(rows)), config)
        gradients = torch.autograd.grad(loss, parameters)
        norms.append(torch.cat([gradient.flatten() for gradient in gradients]).norm().item())
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= 0.2 * gradient * min(1.0, 0.3 / norms[-1])
    torch.testing.assert_close(flat(agent), flat(again), rtol=1e-4, atol=1e-5)
    assert min(norms) > 0.3
    np.testing.assert_allclose(found["grad_norm"], np.mean(norms), rtol=1e-4)


ADAPTIVE = {"lr_schedule": "adaptive"}


@pytest.mark.parametrize(
    ("name", "factor", "others"),
    [
        ("target_kl", 1.5, {"desired_kl": 1e-9}),
        ("target_kl", 1.5, {"desired_kl": 1e9, **ADAPTIVE}),
        ("desired_kl", 2.0, {"target_kl": None, **ADAPTIVE}),
        ("desired_kl", 2.0, {"target_kl": 1e9, **ADAPTIVE}),
    ],
)
def test_an_epoch_whose_kl_is_past_the_limit_is_the_last_one(name, factor, others):
    """One and a half times the target; with the adaptive schedule twice the desired one, too."""

    def run(target, others):
        settings = {"update_epochs": 12, "learning_rate": 1e-4, name: target, **others}
        agent, optimizer, config = make(torch.optim.Adam, **settings)
        batch = batch_of(agent)
        core.update(agent, optimizer, batch, config)
        kls = []
        for rows, (logprobs, _, _) in zip(agent.rows, agent.outputs, strict=True):
            log_ratio = (logprobs - batch.logprobs[rows]).double().numpy()
            kls.append(np.mean(log_ratio**2) / 2)
        return np.reshape(kls, (-1, config.num_minibatches)).mean(1)

    free = run(0.01, {"target_kl": None})
    assert len(free) == 12
    target = 0.99 * free[10] / factor
    last = int(np.argmax(free > factor * target))
    assert free[last - 1] > 0.75 * factor * target  # past less than the factor, but not past it
    np.testing.assert_array_equal(run(target, others), free[: last + 1])


def test_explained_variance_and_action_std_are_those_of_old_values_and_new_policy():
    agent, optimizer, config = make(learning_rate=0.1)
    batch = random_batch()
    targets = batch.returns.double().numpy()
    for values in (batch.values, batch.returns + 7, torch.zeros(48), 0.5 * batch.returns):
        found = core.update(agent, optimizer, batch._replace(values=values), config)
        share = 1 - np.var(targets - values.double().numpy()) / np.var(targets)
        np.testing.assert_allclose(found["explained_variance"], share, atol=1e-5)
    std = np.log1p(np.exp(agent.raw_std.detach().numpy())).mean()
    np.testing.assert_allclose(found["action_std"], std, rtol=1e-6)
    assert abs(std - config.init_std) > 1e-4


def test_an_update_moves_every_parameter_and_improves_both_losses_on_the_batch():
    agent, optimizer, config = make(torch.optim.Adam, minibatch_size=12, learning_rate=3e-3)
    batch = batch_of(agent)

    def losses():
        metrics = loss_of(agent, batch, config)[1]
        return torch.stack([metrics["policy_loss"], metrics["value_loss"]])

    before, parameters = losses(), [p.detach().clone() for p in agent.parameters()]
    mean = agent.mean_action(batch.obs)[:, 0].mean()
    core.update(agent, optimizer, batch, config)
    assert all(not torch.equal(p, q) for p, q in zip(agent.parameters(), parameters, strict=True))
    assert torch.all(losses() < before - 0.01)
    assert agent.mean_action(batch.obs)[:, 0].mean() > mean + 0.05  # towards what pays


@pytest.mark.parametrize(("coefficient", "grows"), [(1.0, True), (0.0, False)])
def test_the_entropy_bonus_widens_the_policy_and_its_absence_does_not(coefficient, grows):
    agent, optimizer, config = make(entropy_coef=coefficient, learning_rate=0.1)
    batch = random_batch()._replace(advantages=torch.zeros(48))
    before = agent.raw_std.detach().clone()
    core.update(agent, optimizer, batch, config)
    assert torch.all(agent.raw_std > before) if grows else torch.equal(agent.raw_std, before)


# ---- the learning rate ---------------------------------------------------------------------------


def test_both_rates_are_multiplied_by_the_root_of_the_desired_kl_over_the_one_had():
    """By 1.5 at most, and so that the policy's own stays within 1e-6 and 1e-2."""

    def adapted(kl, rate=1e-3, desired_kl=0.01):
        groups = [{"lr": lr, "params": torch.zeros(1)} for lr in (rate, 7 * rate)]
        core.adapt_learning_rates(torch.optim.SGD(groups), kl, desired_kl)
        policy, values = (group["lr"] for group in groups)
        assert values == pytest.approx(7 * policy)
        assert type(policy) is float
        return policy

    expected = {0.01: 1, 0.0144: 1 / 1.2, 0.01 / 1.44: 1.2, 0.02: 0.5**0.5, 0.005: 2**0.5}
    expected |= {5.0: 1 / 1.5, 0.0226: 1 / 1.5, 0.0044: 1.5, 1e-12: 1.5, 0.0: 1.5}
    assert {kl: adapted(kl) for kl in expected} == pytest.approx(
        {kl: 1e-3 * factor for kl, factor in expected.items()}
    )
    assert adapted(0.0, desired_kl=0.0) == pytest.approx(1e-3 / 1.5)  # where it ends at zero
    at_limits = [adapted(1.0, 1.1e-6), adapted(0.0, 9e-3), adapted(0.01, 0.5)]
    assert at_limits == pytest.approx([1e-6, 1e-2, 1e-2])


@pytest.mark.parametrize(
    ("schedule", "share", "factor", "minibatches"),
    [
        ("adaptive", 1.3, 1.3**0.5, 12),
        ("adaptive", 1e6, 1.5, 12),  # once an update, however many minibatches
        ("adaptive", 1e-6, 1 / 1.5, 4),
        ("linear", 1e-6, 1.0, 12),
    ],
)
def test_only_the_adaptive_rate_follows_the_mean_kl_of_each_update(
    schedule, share, factor, minibatches
):
    settings = {"update_epochs": 3, "learning_rate": 1e-3}
    agent, optimizer, config = make(**settings)
    had = core.update(agent, optimizer, random_batch(), config)["approx_kl"]
    agent, optimizer, config = make(lr_schedule=schedule, desired_kl=share * had, **settings)
    found = core.update(agent, optimizer, random_batch(), config)
    rate = optimizer.param_groups[0]["lr"]
    assert rate == found["learning_rate"] == pytest.approx(1e-3 * factor, rel=1e-3)
    assert len(agent.rows) == minibatches


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ("constant", [1, 1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0, 0]),
        ("cosine", [1, (1 + math.sqrt(0.5)) / 2, 0.5, 0, 0]),
        ("adaptive", [1, 1, 1, 1, 1]),  # goes on from where it stands
    ],
)
def test_the_rates_of_policy_and_values_are_functions_of_the_absolute_step(schedule, shares):
    rates = {"learning_rate": 2e-3, "value_learning_rate": 7e-4}
    config = tiny(lr_schedule=schedule, total_timesteps=10_000, **rates)
    learner, found = core.Learner(config), []
    for step in (0, 2500, 5000, 10_000, 11_000):
        core.schedule_learning_rates(learner.optimizer, config, step)
        found.append([float(group["lr"]) for group in learner.optimizer.param_groups])
    np.testing.assert_allclose(found, np.outer(shares, [2e-3, 7e-4]), rtol=1e-6, atol=1e-18)
    policy, values = (group["params"] for group in learner.optimizer.param_groups)
    assert {*map(id, values)} == {*map(id, learner.agent.critic.parameters())}
    assert {*map(id, policy + values)} == {*map(id, learner.agent.parameters())}
