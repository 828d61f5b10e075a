"""Flags, environment and defaults agree, because they are made from the same fields."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from serve.errors import SettingsError
from serve.settings import Settings, env_name, flag_name, from_arguments

# A value other than the default for every setting; a new setting without one fails the first test.
OTHER: dict[str, Any] = {
    "models_dir": Path("models"),
    "default_model": "mlp",
    "host": "0.0.0.0",
    "grpc_port": 1234,
    "http_host": "0.0.0.0",
    "http_port": 1235,
    "provider": "cpu",
    "instances": 3,
    "intra_op_threads": 2,
    "max_batch_size": 32,
    "max_queue_delay_us": 500,
    "crowd_rest_us": 0,
    "max_queue_images": 5000,
    "max_count": 128,
    "watchdog_s": 5.0,
    "self_check_interval_s": 1.5,
    "drain_grace_s": 2.5,
    "drain_deadline_s": 3.5,
    "max_connection_age_s": 60.0,
    "reflection": False,
    "log_level": "debug",
}


@pytest.mark.parametrize("name", [spec.name for spec in dataclasses.fields(Settings)])
def test_flag_and_environment_set_the_same_field(name: str) -> None:
    value = OTHER[name]
    assert getattr(Settings(), name) != value
    text = str(value)
    by_flag = from_arguments([flag_name(name), text], {})
    by_environment = from_arguments([], {env_name(name): text})
    assert by_flag == by_environment == dataclasses.replace(Settings(), **{name: value})


def test_the_flag_wins_over_the_environment() -> None:
    assert from_arguments(["--grpc-port=1"], {"DIGITS_GRPC_PORT": "2"}).grpc_port == 1


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--grpc-port=65536", "--grpc-port must be from 0 to 65535, got 65536"),
        ("--grpc-port=http", "--grpc-port must be a whole number, got 'http'"),
        ("--provider=tpu", "--provider must be one of auto, cuda, cpu, got 'tpu'"),
        ("--watchdog-s=nan", "--watchdog-s must be from"),
        ("--reflection=maybe", "--reflection must be true or false, got 'maybe'"),
        ("--max-queue-images=100", "--max-count 4096 is over --max-queue-images 100"),
    ],
)
def test_an_unusable_value_names_the_flag(flag: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        from_arguments([flag], {})


def test_an_unusable_variable_names_the_variable() -> None:
    with pytest.raises(SettingsError, match="DIGITS_INSTANCES must be a whole number"):
        from_arguments([], {"DIGITS_INSTANCES": "all"})


def test_every_setting_is_explained_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        from_arguments(["--help"], {})
    text = capsys.readouterr().out
    for spec in dataclasses.fields(Settings):
        assert flag_name(spec.name) in text
        assert env_name(spec.name) in text
