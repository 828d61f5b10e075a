"""A bundle is served whole and as exported, or refused by name: missing, half-written, tampered, of the wrong kind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from serve.engine.golden import golden_difference, golden_samples
from serve.engine.provider import EngineOptions, choose_provider
from serve.engine.session import Engine
from serve.errors import BundleError, ProviderError, SettingsError
from serve.manifest import BUNDLED_DIR, MANIFEST_FILE, ONNX_FILE, parse_manifest, sha256
from serve.models.model import DEFAULT_BATCH_SIZES, batch_size
from serve.models.repository import Repository, read_bundle
from serve.models.serving_file import parse_policies, pick


def repository(folder: Path) -> Repository:
    return Repository(folder)


def rewrite(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads((bundle / MANIFEST_FILE).read_text())
    change(values)
    (bundle / MANIFEST_FILE).write_text(json.dumps(values))


def swap_model(bundle: Path, model: bytes) -> None:
    """Put another graph in, with a manifest that agrees with it."""
    (bundle / ONNX_FILE).write_bytes(model)
    rewrite(bundle, lambda values: values["files"].update({ONNX_FILE: sha256(model)}))


def test_the_bundled_models_are_read_and_pass_their_golden_check(bundles: Path) -> None:
    found = repository(bundles).scan()
    for name, versions in found.items():
        bundle = repository(bundles).read(name, max(versions))
        Engine(bundle.model, bundle.manifest, EngineOptions(), 64).check_golden()
    assert list(found) == ["cdcgan", "dcgan", "mlp", "rpgan"]


def test_bundled_models_come_from_full_length_runs_on_mnist_itself(bundles: Path) -> None:
    steps = {"mlp": 93_800, "dcgan": 9_380, "cdcgan": 37_520, "rpgan": 42_210}
    for name, step in steps.items():
        training = read_bundle(bundles / name / "1").manifest.training
        assert training["step"] == step
        assert training["provenance"]["data"]["train-images-idx3-ubyte"].startswith("ba891046e6505d7a")


def test_the_bundled_graphs_name_no_file_of_the_machine_that_made_them(bundles: Path) -> None:
    here = str(Path(__file__).parents[2]).encode()
    for path in bundles.glob("*/*/*"):
        content = path.read_bytes()
        assert here not in content, path
        assert b"site-packages" not in content, path


def test_manifest_survives_its_own_json(bundles: Path) -> None:
    manifest = read_bundle(bundles / "dcgan" / "1").manifest
    assert parse_manifest(manifest.to_json().encode(), "again") == manifest


def test_a_manifest_of_the_schema_before_is_read_and_follows_the_default_batch_size(bundles: Path) -> None:
    def older(values: dict[str, Any]) -> None:
        values["schema_version"] = 3
        del values["batch_sizes"]

    assert batch_size(read_bundle(bundles / "mlp" / "1").manifest, "cpu") == 64
    rewrite(bundles / "mlp" / "1", older)
    manifest = read_bundle(bundles / "mlp" / "1").manifest
    assert (manifest.schema_version, manifest.batch_sizes) == (3, {})
    assert batch_size(manifest, "cpu") == DEFAULT_BATCH_SIZES["cpu"]


def test_complete_versions_are_found_and_half_copied_and_oddly_named_ones_are_not(bundles: Path) -> None:
    for number in ("2", "10", "11", "007", "-3", "1e3", "９"):
        (bundles / "mlp" / number).mkdir()
        if number != "11":
            (bundles / "mlp" / number / MANIFEST_FILE).write_text("{}")
    (bundles / "mlp" / "11" / ONNX_FILE).write_bytes(b"half")  # the manifest comes last
    (bundles / "mlp" / ".new-x").mkdir()
    (bundles / "Mlp Copy").mkdir()
    found = repository(bundles).scan()
    assert {name: list(versions) for name, versions in found.items()} == {
        "cdcgan": [1],
        "dcgan": [1],
        "mlp": [1, 2, 10],
        "rpgan": [1],
    }


def test_a_fingerprint_changes_with_any_file(bundles: Path) -> None:
    before = repository(bundles).scan()["mlp"][1]
    assert repository(bundles).scan()["mlp"][1] == before
    os.utime(bundles / "mlp" / "1" / "preview.png", ns=(1, 1))
    assert repository(bundles).scan()["mlp"][1] != before


@pytest.mark.parametrize(
    ("text", "there", "picked"),
    [
        ("latest", [1, 2, 9], [9]),
        ("latest:2", [1, 2, 9], [2, 9]),
        ("latest:5", [1, 2], [1, 2]),
        ("1+4", [1, 2, 4, 9], [1, 4]),
        ("7", [1, 2], []),
        ("latest:3,mlp=1", [1, 2], [1]),
        ("dcgan=2, latest:2", [1, 2, 3], [2, 3]),
    ],
)
def test_a_policy_picks_versions(text: str, there: list[int], picked: list[int]) -> None:
    policies = parse_policies(text)
    assert pick(policies.get("mlp", policies[""]), there) == picked


@pytest.mark.parametrize("text", ["", "newest", "latest:0", "latest:x", "1+", "0", "../mlp=1", "mlp=", "mlp=latest:-1"])
def test_an_unusable_policy_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="--versions: "):
        parse_policies(text)


def test_links_may_stay_inside_the_repository_and_not_leave_it(bundles: Path, tmp_path: Path) -> None:
    outside = tmp_path / "secret.onnx"
    outside.write_bytes((bundles / "mlp" / "1" / ONNX_FILE).read_bytes())
    kept = bundles / "mlp" / "1" / ONNX_FILE
    kept.rename(bundles / "shared.onnx")
    kept.symlink_to("../../shared.onnx")  # as Kubernetes mounts and git-sync lay files out
    assert repository(bundles).read("mlp", 1).manifest.name == "mlp"
    kept.unlink()
    kept.symlink_to(outside)
    with pytest.raises(BundleError, match=r"model\.onnx leads out of"):
        repository(bundles).read("mlp", 1)
    (bundles / "dcgan").rename(tmp_path / "dcgan")
    (bundles / "dcgan").symlink_to(tmp_path / "dcgan")
    with pytest.raises(BundleError, match=r"manifest\.json leads out of"):
        repository(bundles).read("dcgan", 1)


def test_what_is_no_plain_file_is_refused_and_not_waited_for(bundles: Path) -> None:
    path = bundles / "mlp" / "1" / ONNX_FILE
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(BundleError, match=r"model\.onnx cannot be read \(no regular file\)"):
        repository(bundles).read("mlp", 1)
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(BundleError, match="cannot be read"):
        repository(bundles).read("mlp", 1)


@pytest.mark.parametrize("name", ["../mlp", "..", "mlp/../dcgan", "/etc", "mlp\0", "MLP", "mlp ", "", "é", "a" * 64, "-x", "\n"])
def test_odd_names_are_refused_before_the_disk_is_touched(name: str, bundles: Path) -> None:
    with pytest.raises(BundleError, match="is no model name"):
        repository(bundles).read(name, 1)


@pytest.mark.parametrize("name", ["model.onnx", "model.ts", "parity.json", "preview.png"])
def test_a_tampered_file_is_refused_by_name(name: str, bundles: Path) -> None:
    path = bundles / "dcgan" / "1" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=rf"{name} is not the file that was exported"):
        read_bundle(path.parent)


@pytest.mark.parametrize("name", ["model.onnx", "manifest.json", "parity.json"])
def test_a_missing_file_is_refused_by_name(name: str, bundles: Path) -> None:
    (bundles / "dcgan" / "1" / name).unlink()
    with pytest.raises(BundleError, match=rf"{name} cannot be read"):
        read_bundle(bundles / "dcgan" / "1")


def test_a_moved_bundle_is_refused(bundles: Path) -> None:
    (bundles / "dcgan" / "1").rename(bundles / "dcgan" / "7")
    with pytest.raises(BundleError, match="dcgan/1"):
        read_bundle(bundles / "dcgan" / "7")


def test_a_manifest_cannot_name_files_elsewhere(bundles: Path) -> None:
    rewrite(bundles / "dcgan" / "1", lambda values: values["files"].update({"../../mlp/1/model.onnx": "0" * 64}))
    with pytest.raises(BundleError, match="no plain file name"):
        read_bundle(bundles / "dcgan" / "1")


def drop(field: str) -> Callable[[dict[str, Any]], None]:
    return lambda values: values.pop(field) and None


def put(field: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda values: values.update({field: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("latent_size"), "`latent_size`"),
        (put("colour", "red"), "`colour`"),
        (put("schema_version", 99), "schema version 99.* 3, 4, 5"),
        (put("schema_version", "1\n"), r"schema version .1.{1,4}n\b"),
        (put("latent_size", "100"), r"`str` - at `\$.latent_size`"),
        (put("latent_size", 64), "'golden.latents'"),
        (put("precision", "fp8"), r"'fp8' - at `\$.precision`"),
        (put("version", 0), r">= 1 - at `\$.version`"),
        (put("name", "../etc"), r"`\$.name`"),
        (put("files", {}), "'files'"),
        (lambda values: values["golden"].update(latents="?"), r"base64.* - at `\$.golden.latents`"),
        (lambda values: values["golden"].update(labels="AAAA"), "'golden.labels'"),
        (put("labels", 10), "'golden.labels'"),
        (put("cuda_buckets", [8, 1]), "'cuda_buckets'"),
        (lambda values: values["golden"].update(count=10**9), r"<= 64 - at `\$.golden.count`"),
    ],
)
def test_a_manifest_that_is_off_is_refused_by_field(
    change: Callable[[dict[str, Any]], None], message: str, bundles: Path
) -> None:
    rewrite(bundles / "dcgan" / "1", change)
    with pytest.raises(BundleError, match=message):
        read_bundle(bundles / "dcgan" / "1")


@given(
    content=st.binary(max_size=200)
    | st.recursive(st.none() | st.text() | st.integers(), st.lists).map(lambda value: json.dumps(value).encode())
)
def test_no_bytes_make_the_manifest_reader_fail_otherwise_than_by_name(content: bytes) -> None:
    with pytest.raises(BundleError, match="somewhere"):
        parse_manifest(content, "somewhere")


def test_a_folder_that_is_not_there_says_how_to_get_one(tmp_path: Path) -> None:
    assert repository(tmp_path).scan() == {}
    with pytest.raises(BundleError, match=r"nothing is not a folder.*make export"):
        repository(tmp_path / "nothing").scan()


def graph(inputs: list[Any], batch: str | int, latent_size: int = 100, name: str = "latents") -> bytes:
    """A tiny model with the right outputs' types and whatever input is asked for."""
    source = helper.make_tensor_value_info(name, TensorProto.FLOAT, inputs)
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 1, 28, 28])
    pixels = helper.make_tensor_value_info("pixels", TensorProto.UINT8, [batch, 28, 28])
    weight = helper.make_tensor("weight", TensorProto.FLOAT, [latent_size, 784], np.zeros(latent_size * 784, np.float32))
    shapes = [
        helper.make_tensor("four", TensorProto.INT64, [4], [-1, 1, 28, 28]),
        helper.make_tensor("three", TensorProto.INT64, [3], [-1, 28, 28]),
    ]
    nodes = [
        helper.make_node("MatMul", [name, "weight"], ["flat"]),
        helper.make_node("Reshape", ["flat", "four"], ["images"]),
        helper.make_node("Reshape", ["flat", "three"], ["levels"]),
        helper.make_node("Cast", ["levels"], ["pixels"], to=TensorProto.UINT8),
    ]
    made = helper.make_graph(nodes, "tiny", [source], [images, pixels], [weight, *shapes])
    content: bytes = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()
    onnx.checker.check_model(content)
    return content


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (graph(["batch", 64], "batch", latent_size=64), "not latents float32"),
        (graph(["batch", 100], "batch", name="noise"), "not latents float32"),
        (graph([4, 100], 4), "fixed batch axis"),
        (b"this is no graph", "its file is no ONNX model"),
        (b"", "ONNX Runtime cannot load it"),
    ],
)
def test_a_graph_of_the_wrong_kind_is_refused(model: bytes, message: str, bundles: Path) -> None:
    swap_model(bundles / "dcgan" / "1", model)
    bundle = read_bundle(bundles / "dcgan" / "1")
    with pytest.raises(BundleError, match=message):
        Engine(bundle.model, bundle.manifest, EngineOptions(), 64)


def test_another_models_graph_fails_the_golden_check_naming_the_row(bundles: Path) -> None:
    swap_model(bundles / "dcgan" / "1", graph(["batch", 100], "batch"))
    bundle = read_bundle(bundles / "dcgan" / "1")
    with pytest.raises(BundleError, match=r"golden sample \d differs by up to \d+ levels"):
        Engine(bundle.model, bundle.manifest, EngineOptions(), 64).check_golden()


def test_golden_check_allows_one_level_rarely_and_no_more(bundles: Path) -> None:
    manifest = read_bundle(bundles / "mlp" / "1").manifest
    expected = golden_samples(manifest).pixels
    near = expected.copy()
    near[3, 14, 14] ^= 1
    assert golden_difference(manifest, expected, near) is None
    far = expected.copy()
    far[5, 0, 0] += 2
    assert "golden sample 5 differs by up to 2 levels" in str(golden_difference(manifest, expected, far))
    many = expected ^ np.uint8(1)
    assert "0.00% of all pixels identical" in str(golden_difference(manifest, expected, many))


def test_cuda_asked_for_and_missing_is_refused() -> None:
    try:
        provider = choose_provider("cuda")
    except ProviderError as error:
        assert "--provider cuda" in str(error)  # noqa: PT017  # both outcomes are right, on different machines
        assert choose_provider("auto") == "cpu"
    else:
        assert provider == "cuda"


def test_a_folder_of_one_models_versions_is_read_as_kserve_lays_it_out(tmp_path: Path) -> None:
    """KServe mounts what lies below ``<name>/`` as ``/mnt/models``."""
    shutil.copytree(BUNDLED_DIR / "mlp", tmp_path / "mnt")
    single = Repository(tmp_path / "mnt", single=True)
    assert {name: list(versions) for name, versions in single.scan().items()} == {"mlp": [1]}
    assert single.read("mlp", 1).manifest.name == "mlp"
    with pytest.raises(BundleError, match="mlp/1"):
        single.read("dcgan", 1)
    shutil.rmtree(tmp_path / "mnt" / "1")
    assert single.scan() == {}
