"""A Ray cluster as a plan sees it, and what is refused of one."""

from __future__ import annotations

import pytest

from conf.clusters import ClusterConfig
from conf.errors import ClusterError
from launch.elsewhere.ray_cluster import COMPARED, check_described, check_ray, machine_of
from launch.placement import Machine, workers_left

ADDRESS = "http://head:8265"


def ray_config(**fields) -> ClusterConfig:
    return ClusterConfig(name="ray", **{"address": ADDRESS, "storage": "/shared", **fields})


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([{"CPU": 4.0}, {"CPU": 4.0}], (8, 4, "cpu")),
        ([{"CPU": 4.0}, {"CPU": 2.0}], (4, 2, "cpu")),  # equal workers: the smaller node counts
        ([{"CPU": 8.0}, {"CPU": 64.0, "GPU": 8.0}, {"CPU": 64.0, "GPU": 8.0}], (16, 8, "cuda")),
        ([{"CPU": 0.0}, {"CPU": 3.0}], (3, 3, "cpu")),  # a head that only leads
    ],
)
def test_devices_are_those_of_equal_nodes(nodes, expected):
    found = machine_of(nodes, ray_config())
    assert (found.devices, found.devices_per_node, found.device) == expected
    assert found.nodes * found.devices_per_node == found.devices


@pytest.mark.parametrize("fields", [{"workers": 9}, {"nodes": 3}])
def test_more_than_there_is_is_refused(fields):
    with pytest.raises(ClusterError, match="at most 8 devices on 2 nodes"):
        machine_of([{"CPU": 4.0}] * 2, ray_config(**fields))


def test_a_cluster_without_devices_is_refused():
    with pytest.raises(ClusterError, match="at most 0 devices"):
        machine_of([{"CPU": 0.0}], ray_config())


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"address": None}, "cluster.address"),
        ({"address": "head:6379"}, "cluster.address"),
        ({"address": "ray://head:10001"}, "cluster.address"),
        ({"storage": None}, "cluster.storage"),
        ({"storage": "shared"}, "cluster.storage"),
    ],
)
def test_an_address_or_storage_that_no_run_can_use_is_refused(fields, key):
    with pytest.raises(ClusterError, match=key):
        check_ray(ray_config(**fields))


def test_a_driver_needs_no_storage():
    check_ray(ray_config(address="auto", storage=None))


def node(**fields: str) -> dict[str, str]:
    return {"python": "3.11.9", "storage": "True", **dict.fromkeys(COMPARED, "1.0"), **fields}


def test_equal_nodes_pass(tmp_path):
    check_described({"a": node(), "b": node()}, root=tmp_path)


@pytest.mark.parametrize("key", ["python", *COMPARED])
def test_another_version_on_one_node_is_refused_with_both(key, tmp_path):
    with pytest.raises(ClusterError, match=rf"(?s){key} on the nodes.*a: .*b: 2\.0"):
        check_described({"a": node(), "b": node(**{key: "2.0"})}, root=tmp_path)


def test_a_package_that_all_nodes_lack_is_refused(tmp_path):
    with pytest.raises(ClusterError, match="peft on the nodes"):
        check_described({"a": node(peft="missing")}, root=tmp_path)


def test_a_node_that_does_not_see_the_runs_is_named(tmp_path):
    with pytest.raises(ClusterError, match="which b cannot see"):
        check_described({"a": node(), "b": node(storage="False")}, root=tmp_path)


@pytest.mark.parametrize(
    ("asked", "devices", "batch_size", "workers"),
    [(2, 2, 8, 2), (2, 1, 8, 1), (4, 3, 8, 2), (6, 5, 12, 4), (3, 0, 9, 1), (8, 7, 7, 7)],
)
def test_a_training_goes_on_with_what_is_left(asked, devices, batch_size, workers):
    left = Machine(devices=devices, devices_per_node=1, device="cpu", name="left")
    found = workers_left(asked, left, batch_size=batch_size)
    assert found == workers
    assert batch_size % found == 0
