"""Flags, environment and defaults agree, because they are made from the same fields."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from serve.command_line import release
from serve.errors import SettingsError
from serve.settings import Settings, env_name, flag_name, from_arguments

# A value other than the default for every setting; a new setting without one fails the first test.
OTHER: dict[str, Any] = {
    "models_dir": Path("models"),
    "default_model": "mlp",
    "versions": "latest:2,mlp=1+4",
    "serving_file": Path("serving.json"),
    "single_model": True,
    "wait_for_models": True,
    "poll_interval_s": 1.0,
    "host": "127.0.0.2",
    "http_names": "digits.example.org",
    "grpc_port": 1234,
    "tls_cert": Path("tls.crt"),
    "tls_key": Path("tls.key"),
    "tls_client_ca": Path("ca.crt"),
    "insecure": True,
    "tokens_file": Path("tokens.json"),
    "caller_images": 8192,
    "caller_requests_per_s": 0.5,
    "http_host": "0.0.0.0",
    "http_port": 1235,
    "device": 1,
    "https_port": 1236,
    "http_origins": "https://app.example.org,http://localhost:3000",
    "provider": "cpu",
    "buckets": "powers",
    "cuda_graphs": "off",
    "device_latents": False,
    "cuda_options": "prefer_nhwc=1,use_tf32=0",
    "gpu_mem_limit_mib": 2048,
    "instances": 3,
    "intra_op_threads": 2,
    "max_batch_size": 32,
    "linger_us": 500,
    "max_queue_images": 5000,
    "max_count": 128,
    "max_inflight_mib": 512,
    "watchdog_s": 5.0,
    "self_check_interval_s": 1.5,
    "drain_grace_s": 2.5,
    "drain_deadline_s": 3.5,
    "max_connection_age_s": 0.0,
    "load_reports": True,
    "reflection": False,
    "metrics": False,
    "http_api": False,
    "page": False,
    "log_format": "json",
    "log_level": "debug",
}
# What a setting cannot be without.
WITH: dict[str, list[str]] = {
    "tls_cert": ["tls_key"],
    "tls_key": ["tls_cert"],
    "http_host": ["http_api", "page"],
    "http_api": ["page"],
    "tls_client_ca": ["tls_cert", "tls_key"],
}


@pytest.mark.parametrize("name", [spec.name for spec in dataclasses.fields(Settings)])
def test_flag_and_environment_set_the_same_field(name: str) -> None:
    values = {each: OTHER[each] for each in (name, *WITH.get(name, ()))}
    assert getattr(Settings(), name) != values[name]
    by_flag = from_arguments([word for each, value in values.items() for word in (flag_name(each), str(value))], {})
    by_environment = from_arguments([], {env_name(each): str(value) for each, value in values.items()})
    assert by_flag == by_environment == dataclasses.replace(Settings(), **values)


def test_a_switch_needs_no_value() -> None:
    assert from_arguments(["--insecure", "--host=0.0.0.0"], {}).insecure


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1.2.3", "::1", "[::1]"])
def test_plaintext_on_loopback_needs_no_word(host: str) -> None:
    assert Settings(host=host).host == host


def test_without_the_page_the_http_api_is_still_there_and_refused_in_plaintext_beyond_loopback() -> None:
    """Issue: --page false turned off /v1 and /v2 as well, which its help did not say."""
    assert from_arguments(["--page=false"], {}).http_api
    with pytest.raises(SettingsError, match="--http-host"):
        from_arguments(["--page=false", "--http-host=0.0.0.0"], {})
    assert not from_arguments(["--page=false", "--http-api=false", "--http-host=0.0.0.0"], {}).http_api


TLS = ("--tls-cert=a.pem", "--tls-key=a.key")


def test_with_a_certificate_the_http_api_is_over_tls_and_never_on_the_plaintext_port() -> None:
    assert not from_arguments([], {}).https
    assert from_arguments([*TLS, "--http-host=0.0.0.0", "--host=0.0.0.0"], {}).https
    assert from_arguments([*TLS, "--insecure"], {}).https
    assert not from_arguments([*TLS, "--page=false", "--http-api=false"], {}).https
    with pytest.raises(SettingsError, match=r"^--https-port 8080 is --http-port too, which is plaintext [^\n]*: name another$"):
        from_arguments([*TLS, "--https-port=8080"], {})
    assert from_arguments([*TLS, "--https-port=0", "--http-port=0"], {}).https


def test_origins_need_the_http_api() -> None:
    with pytest.raises(SettingsError, match="--http-origins needs --http-api"):
        from_arguments(["--http-api=false", "--page=false", "--http-origins=*"], {})
    assert from_arguments(["--http-origins= HTTPS://A.example , *"], {}).allowed_http_origins == {"https://a.example", "*"}


def test_the_flag_wins_over_the_environment() -> None:
    assert from_arguments(["--grpc-port=1"], {"DIGITS_GRPC_PORT": "2"}).grpc_port == 1


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--grpc-port=65536", "--grpc-port .*0 to 65535.* 65536"),
        ("--grpc-port=http", "--grpc-port .*'http'"),
        ("--provider=tpu", "--provider .*auto, cuda, cpu.*'tpu'"),
        ("--watchdog-s=nan", "--watchdog-s .*nan"),
        ("--reflection=maybe", "--reflection .*'maybe'"),
        ("--host=0.0.0.0", r"--host 0\.0\.0\.0 .*--tls-cert.*--insecure"),
        ("--host=example.org", "--host example.org "),
        ("--http-host=0.0.0.0", r"--http-host 0\.0\.0\.0 .*--http-api false --page false"),
        ("--http-api=false", "--page .*--http-api"),
        ("--tls-cert=a.pem", "--tls-cert and --tls-key"),
        ("--http-origins=https://app.example.org/", "--http-origins: 'https://app.example.org/' is no origin"),
        ("--http-origins=https://app.example.org:443", "--http-origins: .*:PORT where it is not 443 or 80"),
        ("--http-origins=http://a.example:80", "--http-origins: .*:PORT where it is not 443 or 80"),
        ("--http-origins=app.example.org", "--http-origins: 'app.example.org' is no origin"),
        ("--http-origins=https://*.example.org", "--http-origins: .* is no origin"),
        ("--http-origins=null", "--http-origins: 'null' is no origin"),
        ("--tls-client-ca=a.pem", "--tls-client-ca .*--tls-cert"),
        ("--caller-images=100", "--caller-images 100 .*--max-count 4096"),
        ("--cuda-options=speed=1", "--cuda-options: 'speed' .*use_tf32, prefer_nhwc"),
        ("--cuda-options=use_tf32=2", "--cuda-options: use_tf32 .*0, 1.*'2'"),
        ("--cuda-options=cudnn_conv_algo_search=DEFAULT", "cudnn_conv_algo_search .*EXHAUSTIVE, HEURISTIC, got 'DEFAULT'"),
        ("--cuda-graphs=on", "--cuda-graphs on .*--provider cuda"),
        ("--front=native", "--front .*0014"),
        ("--max-queue-images=100", "--max-count 4096 .*--max-queue-images 100"),
    ],
)
def test_an_unusable_value_names_the_flag(flag: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        from_arguments([flag], {})


def test_an_unusable_variable_names_the_variable() -> None:
    with pytest.raises(SettingsError, match=r"DIGITS_INSTANCES .*'all'"):
        from_arguments([], {"DIGITS_INSTANCES": "all"})
    with pytest.raises(SettingsError, match=r"DIGITS_FRONT .*0014"):
        from_arguments([], {"DIGITS_FRONT": "native"})


def test_every_setting_is_explained_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        from_arguments(["--help"], {})
    text = capsys.readouterr().out
    for spec in dataclasses.fields(Settings):
        assert flag_name(spec.name) in text
        assert env_name(spec.name) in text


@pytest.mark.parametrize("name", ["DIGITS_PORTT", "DIGITS_MAX_COUNTS", "DIGITS_"])
def test_a_variable_that_is_no_setting_is_refused(name: str) -> None:
    with pytest.raises(SettingsError, match=f"{name} is no setting"):
        from_arguments([], {name: "1"})


def test_variables_of_others_are_left_alone() -> None:
    links = ("SERVE_SERVICE_HOST", "SERVE_PORT", "SERVE_PORT_50051_TCP_ADDR", "SERVICE_PORT_GRPC", "PORT_8080_TCP")
    environment = {f"DIGITS_{name}": "tcp://10.0.0.1:50051" for name in links} | {"DIGITS_TOKEN": "t", "HOME": "/"}
    assert from_arguments([], environment) == Settings()


def test_help_lists_the_choices_and_version_says_which(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--help", "--version"):
        with pytest.raises(SystemExit) as ended:
            from_arguments([flag], {})
        assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "--provider {auto,cuda,cpu}" in said
    assert "--log-format {text,json}" in said
    assert said.endswith(f"digits-serve {release()}\n")
