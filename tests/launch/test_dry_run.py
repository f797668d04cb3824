"""Plans for hardware and models that are not here, and the refusal of what cannot fit."""

import io
import os

import pytest
from rich.console import Console

from conf.devices import DEVICES
from conf.errors import ClusterError, ConfigError
from launch.compose import compose_config
from launch.dry_run import show
from launch.placement import Machine, threads_of, workers_of
from launch.preflight import check
from launch.rates import UTILISATION, device_facts, price_of, rate_of
from launch.train_plan import FACTS

H100S = ["cluster.device=h100", "cluster.nodes=4", "cluster.devices_per_node=8", "dry_run=true"]
LLAMA = ["model=llama3_8b", *H100S]


def planned(tmp_path, exp, *overrides):
    config = compose_config([f"+exp={exp}", f"run.root={tmp_path}", *overrides])
    return check(config, exp=exp, command="")


def training(checked):
    return next(job.estimate for job in checked.plan.jobs if job.kind == "train")


def shown(checked):
    stream = io.StringIO()
    show(checked, Console(file=stream, width=200))
    return stream.getvalue()


def test_llama_8b_on_32_h100_from_its_configuration_alone(tmp_path):
    checked = planned(tmp_path, "lora", *LLAMA)
    estimate = training(checked)
    plan = estimate.training
    # Rank 16 on all seven layers of each of 32 blocks, by hand.
    widths = [4096 + 4096] * 2 + [4096 + 1024] * 2 + [4096 + 14336] * 3
    assert plan.trained_parameters == 32 * 16 * sum(widths)
    assert plan.memory["weights"] == 2 * (8_030_261_248 + plan.trained_parameters)
    assert (plan.workers, plan.zero_stage) == (8, 0)
    assert estimate.is_about and estimate.usd is None
    assert estimate.low_seconds < estimate.seconds < estimate.high_seconds
    text = shown(checked)
    for words in ("32 x h100", "assumed 40% of a peak of 989", "ZeRO stage 0", "pricing=h100_hour"):
        assert words in text
    assert "8 of 32 devices train" in text and "about" in text
    assert list(tmp_path.iterdir()) == []  # nothing was started or written


def test_full_tuning_takes_the_smallest_stage_that_fits_and_says_why(tmp_path):
    checked = planned(tmp_path, "full", *LLAMA, "trainer.batch_size=32", "pricing=h100_hour")
    estimate = training(checked)
    plan = estimate.training
    assert (plan.workers, plan.zero_stage) == (32, 1)
    assert "of 80 GB; stage 0 would take" in plan.zero_reason
    assert plan.memory["total"] <= 0.8 * DEVICES["h100"].memory_bytes
    hours = estimate.seconds / 3600
    assert estimate.usd == pytest.approx(hours * 32 * 2.99)


def test_what_cannot_fit_is_refused_with_what_would_help(tmp_path):
    l4 = ["model=llama3_8b", "cluster.device=l4", "cluster.devices_per_node=2", "dry_run=true"]
    with pytest.raises(ConfigError) as caught:
        planned(tmp_path, "full", *l4)
    text = str(caught.value)
    assert "of 24 GB" in text and "zero=3_offload" in text and "lora" in text
    # Each help that is named does help.
    assert training(planned(tmp_path, "full", *l4, "zero=3_offload")).training.host_bytes > 0
    assert training(planned(tmp_path, "lora", *l4)).training.memory["total"] < 24e9
    more = ["cluster.nodes=4", "trainer.batch_size=8", *l4]
    assert training(planned(tmp_path, "full", *more)).training.workers == 8


def test_a_stage_that_is_given_and_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="zero.stage=auto"):
        planned(tmp_path, "full", *LLAMA, "zero=0")


def test_a_device_that_is_not_here_is_refused_but_for_a_plan(tmp_path):
    config = compose_config(["+exp=lora", f"run.root={tmp_path}", "cluster.device=h100"])
    with pytest.raises(ClusterError, match="dry_run=true"):
        check(config, exp="lora", command="")


def test_more_workers_than_planned_devices_are_refused(tmp_path):
    with pytest.raises(ClusterError, match="at most 32"):
        planned(tmp_path, "lora", *LLAMA, "cluster.workers=33")


def test_a_model_without_sizes_has_tokens_alone(tmp_path):
    checked = planned(tmp_path, "lora", "model=hub", "model.path=owner/name", *H100S)
    estimate = training(checked)
    assert estimate.training is None and estimate.tokens and estimate.seconds is None
    assert "not known before the model is here" in shown(checked)


def test_unknown_facts_are_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ConfigError, match="llama3_8b"):
        planned(tmp_path, "lora", *LLAMA, "model.facts=nothing")


@pytest.mark.parametrize("name", sorted(p.stem for p in FACTS.glob("*.json")))
def test_every_facts_file_gives_a_plan(name, tmp_path):
    assert training(planned(tmp_path, "full", f"model={name}", *H100S)).training.steps > 0


@pytest.mark.parametrize("name", DEVICES)
def test_every_device_has_a_rate_with_its_source(name, tmp_path):
    config = compose_config(["+exp=lora", f"cluster.device={name}", "dry_run=true"])
    facts = device_facts(config)
    assert facts is DEVICES[name]
    from launch.cluster import planned_machine

    rate = rate_of(planned_machine(config.cluster), facts)
    assert rate.flops_per_second == UTILISATION * facts.flops_per_second
    assert facts.source in rate.source and facts.date in rate.source
    assert price_of(config, planned_machine(config.cluster)) is None  # the default is a core's


def test_auto_workers_get_equal_shares():
    config = compose_config(["+exp=lora", *H100S, "trainer.batch_size=24"])
    from launch.cluster import planned_machine

    assert workers_of(config, planned_machine(config.cluster)) == 24


@pytest.mark.parametrize(
    ("nodes", "cores", "batch", "workers", "threads"),
    [(3, 1, 8, 2, 1), (3, 2, 8, 2, 2), (4, 2, 8, 4, 2), (1, 4, 8, 1, 4), (3, 2, 9, 3, 2)],
)
def test_auto_workers_on_cores(nodes, cores, batch, workers, threads):
    """A node each, where the batch goes into as many shares; threads stay on one node."""
    config = compose_config(["+exp=lora", f"trainer.batch_size={batch}"])
    machine = Machine(devices=nodes * cores, devices_per_node=cores, device="cpu", name="test")
    assert workers_of(config, machine) == workers
    assert threads_of(workers, machine) == threads


def test_a_plan_on_this_machine_names_stage_and_bytes(tmp_path):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    checked = planned(
        tmp_path, "lora", "model=llama3_8b", "cluster.device=cpu", "model.dtype=bfloat16"
    )
    plan = training(checked).training
    assert plan.zero_reason.startswith("stage 0: ") and plan.workers == 1
