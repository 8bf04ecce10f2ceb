"""Which platform jax looks for on a machine without an accelerator."""

import importlib

import pytest

import mixcpt_jax
from mixcpt_jax.core import machine


@pytest.fixture(autouse=True)
def with_libtpu(monkeypatch):
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: object())


def chosen(system, **environment):
    machine.choose_platform(environment, system)
    return environment.get("JAX_PLATFORMS")


def test_machine_without_an_accelerator_is_a_cpu(tmp_path):
    (tmp_path / "sys/bus/pci/devices/0").mkdir(parents=True)
    (tmp_path / "sys/bus/pci/devices/0/vendor").write_text("0x8086\n")
    assert chosen(tmp_path) == "cpu"


@pytest.mark.parametrize("device", ["accel0", "vfio/0", "nvidia0", "kfd"])
def test_device_file_is_an_accelerator(tmp_path, device):
    (tmp_path / "dev" / device).parent.mkdir(parents=True)
    (tmp_path / "dev" / device).touch()
    assert chosen(tmp_path) is None


@pytest.mark.parametrize("vendor", machine._ACCELERATOR_VENDORS)
def test_device_of_the_bus_is_an_accelerator(tmp_path, vendor):
    (tmp_path / "sys/bus/pci/devices/0").mkdir(parents=True)
    (tmp_path / "sys/bus/pci/devices/0/vendor").write_text(f"{vendor}\n")
    assert chosen(tmp_path) is None


def test_choice_of_the_user_stays(tmp_path):
    assert chosen(tmp_path, JAX_PLATFORMS="tpu") == "tpu"
    assert chosen(tmp_path, TPU_NAME="local") is None


def test_without_libtpu_nothing_is_chosen(tmp_path, monkeypatch):
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None)
    assert chosen(tmp_path) is None


def test_platform_is_chosen_when_the_package_is_imported(monkeypatch):
    """Before code of the user imports jax, as well as by each command."""
    chosen = []
    monkeypatch.setattr(machine, "choose_platform", lambda: chosen.append("once"))
    importlib.reload(mixcpt_jax)
    assert chosen == ["once"]
