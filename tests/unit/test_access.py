"""Tokens, limits and certificates by themselves."""

from __future__ import annotations

import json
import random
import string
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from serve import files
from serve.access import identity as callers_module
from serve.access import tls
from serve.access import tokens as tokens_module
from serve.access.budget import Budget, Hold
from serve.access.identity import Account, Accounts, Caller, peer_address
from serve.access.tls import Certificates
from serve.access.tokens import TokenFile, main, parse_tokens
from serve.errors import CallerLimitError, ForbiddenError, OverloadedError, SettingsError, UnauthenticatedError
from tests.certificates import Certificates as CertificateFiles
from tests.waiting import wait_until

SHA = "ab" * 32


def caller(*authorization: str | bytes, peer: str = "ipv4:10.0.0.1:999") -> Caller:
    return Caller(lambda: peer, authorization)


def add(path: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """A new token in the file, as the command line makes it."""
    assert main(["add", str(path), *flags]) == 0
    return capsys.readouterr().out.strip()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tokens.json"


def test_a_token_is_let_in_and_the_file_holds_no_trace_of_it(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    token = add(path, capsys, "--name=jobs", "--images=5000")
    entry = TokenFile(path).check(token)
    assert (entry.name, entry.scopes, entry.images) == ("jobs", ("generate",), 5000)
    assert token.partition(".")[2] not in path.read_text()
    assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("presented", "reason"),
    [
        ("", "malformed"),
        ("jobs", "malformed"),
        ("jobs." + "x" * 300, "malformed"),
        ("jobs.wrong", "unknown"),
        ("nobody.wrong", "unknown"),
        ("jobs." + SHA, "unknown"),
        ("jobs.\udcff", "unknown"),
    ],
)
def test_what_is_no_token_is_kept_out(presented: str, reason: str, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add(path, capsys, "--name=jobs")
    with pytest.raises(UnauthenticatedError) as caught:
        TokenFile(path).check(presented)
    assert caught.value.denial == reason
    assert "wrong" not in str(caught.value)


def test_a_token_ends_when_it_expires(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    late = add(path, capsys, "--name=late", "--expires=2020-01-01T00:00:00+00:00")
    fresh = add(path, capsys, "--name=fresh", "--expires=2999-01-01T00:00:00+02:00")
    tokens = TokenFile(path)
    assert tokens.check(fresh).name == "fresh"
    with pytest.raises(UnauthenticatedError, match=r"'late'.* 2020-01-01") as caught:
        tokens.check(late)
    assert caught.value.denial == "expired"


def test_a_revoked_token_is_out_at_the_next_look_and_a_damaged_file_changes_nothing(
    path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    first, second = add(path, capsys, "--name=first"), add(path, capsys, "--name=second")
    reloads: list[str] = []
    tokens = TokenFile(path, reloads.append)
    assert tokens.check(first).name == "first"
    assert main(["remove", str(path), "--name=first"]) == 0
    tokens.look()
    with pytest.raises(UnauthenticatedError):
        tokens.check(first)
    path.write_text("{")
    tokens.look()
    assert tokens.check(second).name == "second"
    path.unlink()
    tokens.look()
    assert tokens.check(second).name == "second"
    assert reloads == ["ok", "failed", "failed"]
    assert "what was read before stays in force" in caplog.text
    assert second not in caplog.text


def test_the_file_is_looked_at_by_itself_and_a_failure_ends_nothing(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counter moves when a reading fails, not when a call comes; and no call looks at a disk."""
    token = add(path, capsys, "--name=jobs")
    monkeypatch.setattr(tokens_module, "RELOAD_CHECK_S", 0.01)
    honest, failures = tokens_module.Watched.look, [MemoryError(), MemoryError()]

    def look(self: Any) -> Any:
        if failures:
            raise failures.pop()
        return honest(self)

    monkeypatch.setattr(tokens_module.Watched, "look", look)
    reloads: list[str] = []
    tokens = TokenFile(path, reloads.append)
    tokens.watch()
    assert main(["remove", str(path), "--name=jobs"]) == 0
    wait_until(lambda: "ok" in reloads)
    assert reloads == ["failed", "failed", "ok"]
    with pytest.raises(UnauthenticatedError):
        tokens.check(token)


def test_a_renewal_that_went_wrong_is_counted_before_anybody_connects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "LOOK_S", 0.01)
    files, reloads = CertificateFiles(tmp_path), list[str]()
    Certificates(files.cert, files.key, None, reloads.append).watch()
    files.cert.write_text("half a certifi")
    wait_until(lambda: "failed" in reloads)
    files.renew()
    wait_until(lambda: reloads[-1] == "ok")


def test_tokens_that_are_added_at_the_same_time_are_all_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = tokens_module._write

    def slowly(*given: Any) -> None:
        time.sleep(0.2)  # others have read the file by then, if they may
        honest(*given)

    monkeypatch.setattr(tokens_module, "_write", slowly)
    names = [f"caller-{number}" for number in range(4)]
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(lambda name: main(["add", str(path), "--name", name]), names)) == [0] * 4
    assert set(parse_tokens(path.read_bytes(), "here")) == set(names)


def test_a_tokens_file_that_another_process_keeps_locked_is_one_line(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "LOCK_WAIT_S", 0.1)
    with files.locked(path.parent):
        assert main(["add", str(path), "--name=jobs"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {path} cannot be written (")
    assert f"locked {path.parent}" in said
    assert said.count("\n") == 1


def test_a_tokens_file_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "nowhere" / "tokens.json"
    assert main(["add", str(path), "--name=jobs"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {path} cannot be written (No such file or directory)")
    assert said.count("\n") == 1


def test_the_command_line_refuses_doubles_and_strangers(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add(path, capsys, "--name=jobs")
    before = path.read_text()
    for flags, message in (
        (["add", str(path), "--name=jobs"], "'jobs'"),
        (["remove", str(path), "--name=other"], "'other'; there are jobs"),
        (["add", str(path), "--name=Jobs Two"], "$.name"),
        (["add", str(path), "--name=x", "--scopes=root"], "$.scopes"),
        (["add", str(path), "--name=x", "--scopes=generate,admin"], "the scope admin is gone: python -m serve.admin"),
        (["add", str(path), "--name=x", "--expires=tomorrow"], "expires "),
        (["add", str(path), "--name=x", "--expires=2030-01-01T00:00:00"], "expires "),
    ):
        assert main(flags) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
    assert path.read_text() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["tokens.json"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "a", "sha256": SHA}, "token 0: .*`scopes`"),
        ({"name": "a", "sha256": SHA, "scopes": ["generate"], "colour": 1}, "token 0: .*`colour`"),
        ({"name": "a", "sha256": "abc", "scopes": ["generate"]}, "`\\$.sha256`"),
        ({"name": "a", "sha256": SHA, "scopes": []}, r"1 - at `\$.scopes`"),
        ({"name": "a", "sha256": SHA, "scopes": ["generate"], "images": True}, "`int .*`bool`"),
        ({"name": "a", "sha256": SHA, "scopes": ["generate"], "requests_per_s": -1}, r"`float` >= 0\.0"),
        ("a", "token 0: .*`object`.*`str`"),
    ],
)
def test_a_file_that_is_off_is_refused_by_entry_and_field(entry: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse_tokens(json.dumps({"tokens": [entry]}).encode(), "somewhere")


@given(
    content=st.binary(max_size=200)
    | st.recursive(st.none() | st.text() | st.integers(), st.lists).map(lambda value: json.dumps({"tokens": value}).encode())
)
def test_no_bytes_make_the_token_reader_fail_otherwise_than_by_name(content: bytes) -> None:
    try:
        assert parse_tokens(content, "somewhere") == {}
    except SettingsError as error:
        assert str(error).startswith("somewhere")  # noqa: PT017  # an empty list of tokens is fine


def test_guesses_get_nobody_in_and_take_the_same_work_whether_the_name_is_known_or_not(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    token = add(path, capsys, "--name=jobs")
    file = TokenFile(path)
    work: list[tuple[str, int, int]] = []
    honest_hash, honest_compare = tokens_module.hashlib.sha256, tokens_module.hmac.compare_digest

    def sha256(content: bytes) -> Any:
        work.append(("hashed", len(content), 0))
        return honest_hash(content)

    def compare_digest(ours: str, theirs: str) -> bool:
        work.append(("compared", len(ours), len(theirs)))
        return honest_compare(ours, theirs)

    monkeypatch.setattr(tokens_module.hashlib, "sha256", sha256)
    monkeypatch.setattr(tokens_module.hmac, "compare_digest", compare_digest)
    chance = random.Random(1)
    alphabet = string.ascii_letters + string.digits + "-_"
    for _ in range(1_000):
        guess = "".join(chance.choices(alphabet, k=43))
        for name in ("jobs", "nobs"):
            with pytest.raises(UnauthenticatedError):
                file.check(f"{name}.{guess}")
    assert set(work) == {("hashed", 48, 0), ("compared", 64, 64)}
    assert len(work) == 4_000
    assert file.check(token).name == "jobs"


def test_generating_needs_a_token_and_health_needs_none(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    token = add(path, capsys, "--name=jobs", "--scopes=generate")
    accounts = Accounts(TokenFile(path), 0, 0.0)
    assert accounts.admit(caller(f"Bearer {token}"), "generate").name == "jobs"
    assert accounts.admit(caller(f"bearer  {token}"), "generate").name == "jobs"
    accounts.admit(caller(), "open")
    for presented, reason in (
        (caller(), "missing"),
        (caller(token), "malformed"),
        (caller(f"Basic {token}"), "malformed"),
        (caller(f"Bearer {token}", f"Bearer {token}"), "malformed"),
        (caller(b"\xff"), "malformed"),
    ):
        with pytest.raises(UnauthenticatedError) as caught:
            accounts.admit(presented, "generate")
        assert caught.value.denial == reason


def test_a_file_that_still_lists_admin_is_read_and_the_log_says_that_it_opens_nothing(
    path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    token = add(path, capsys, "--name=operator")
    path.write_text(path.read_text().replace('"generate"', '"admin"'))
    accounts = Accounts(TokenFile(path), 0, 0.0)
    assert caplog.text.count("the scope admin has no meaning any more") == 1
    with pytest.raises(ForbiddenError, match="the token 'operator' lacks the scope generate; it has admin"):
        accounts.admit(caller(f"Bearer {token}"), "generate")
    path.write_text(path.read_text().replace('"admin"', '"generate", "admin"'))
    assert Accounts(TokenFile(path), 0, 0.0).admit(caller(f"Bearer {token}"), "generate").name == "operator"
    assert add(path, capsys, "--name=jobs"), "and the tool goes on with such a file"


def test_images_in_flight_are_limited_and_come_back() -> None:
    account = Account("jobs", 100, 0.0)
    budget = Budget(10 << 20)
    first, second, third = (Hold(account, caller(), budget) for _ in range(3))
    first.take(60, 1)
    second.take(40, 1)
    with pytest.raises(CallerLimitError, match=r"^jobs .*100 .* 1\b.*100$") as caught:
        third.take(1, 1)
    assert caught.value.denial == "images"
    second.give_back()
    with pytest.raises(OverloadedError):
        third.take(40, 20 << 20)
    with pytest.raises(CallerLimitError) as caught:
        third.take(40, 6 << 20)
    assert caught.value.denial == "memory"
    assert (account.images, budget.held_bytes) == (60, 1), "what was refused holds nothing"
    first.give_back()
    first.give_back()
    assert (account.images, budget.held_bytes) == (0, 0)


def test_what_was_taken_without_a_limit_is_not_given_back_to_a_limit_that_came_later() -> None:
    account = Account("jobs", 0, 0.0)
    hold = Hold(account, caller(), Budget(1 << 20))
    hold.take(60, 1)
    account.images_limit = 100
    hold.give_back()
    assert account.images == 0


def test_large_calls_are_counted_for_their_callers_address_or_token() -> None:
    budget, everyone = Budget(10 << 20), Accounts(None, 0, 0.0).admit(caller(), "generate")
    Hold(everyone, caller(peer="ipv4:10.0.0.1:1"), budget).take(1, 5 << 20)
    with pytest.raises(CallerLimitError, match=r"10\.0\.0\.1 "):
        Hold(everyone, caller(peer="ipv4:10.0.0.1:2"), budget).take(1, 1 << 20)
    Hold(Account("jobs", 0, 0.0), caller(peer="ipv4:10.0.0.1:2"), budget).take(1, 4 << 20)
    Hold(everyone, caller(peer="ipv4:10.0.0.1:2"), budget).take(1, 1 << 10)


def test_requests_are_limited_by_a_bucket_that_fills_with_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(callers_module.time, "monotonic", lambda: now[0])
    account = Account("jobs", 0, 4.0)
    for _ in range(4):
        account.count_request()
    with pytest.raises(CallerLimitError, match=r"^jobs .*4\b") as caught:
        account.count_request()
    assert caught.value.retry_after_s == pytest.approx(0.25)
    now[0] += 0.25
    account.count_request()
    with pytest.raises(CallerLimitError):
        account.count_request()
    now[0] += 1000
    for _ in range(4):
        account.count_request()
    with pytest.raises(CallerLimitError):
        account.count_request()


def test_callers_without_tokens_are_told_apart_by_address_and_forgotten_when_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(callers_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(callers_module, "MANY_CALLERS", 10)
    accounts = Accounts(None, 10, 1.0)
    one = accounts.admit(caller(peer="ipv4:10.0.0.1:1"), "generate")
    with pytest.raises(CallerLimitError, match=r"^10\.0\.0\.1 "):
        accounts.admit(caller(peer="ipv4:10.0.0.1:2"), "generate")
    assert accounts.admit(caller(peer="ipv6:[fe80::1]:1"), "generate") is not one
    one.take(5)
    for turn in range(100):
        now[0] += 2.0
        accounts.admit(caller(peer=f"ipv4:10.0.1.{turn}:1"), "generate")
    assert len(accounts._known) <= 12
    assert accounts.admit(caller(peer="ipv4:10.0.0.1:3"), "generate") is one, "its images are still in flight"


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:10.0.0.1:999", "10.0.0.1"),  # gRPC
        ("10.0.0.1", "10.0.0.1"),  # HTTP
        ("ipv6:%5Bfe80::1%5D:999", "fe80::1"),
        ("ipv6:[::1]:999", "::1"),
        ("::1", "::1"),
        ("ipv6:%5B::ffff:10.0.0.1%5D:999", "10.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("unix:/tmp/socket", "unix:/tmp/socket"),
        ("", ""),
    ],
)
def test_a_caller_is_the_same_whatever_transport_it_comes_by(peer: str, address: str) -> None:
    """Issue: limits per caller counted twice, because gRPC says ``ipv4:`` and HTTP does not."""
    assert peer_address(peer) == address


def test_a_tokens_own_limits_replace_the_servers_and_follow_the_file(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = add(path, capsys, "--name=own", "--images=5", "--requests-per-s=0")
    usual = add(path, capsys, "--name=usual")
    accounts = Accounts(TokenFile(path), 100, 3.0)
    account = accounts.admit(caller(f"Bearer {own}"), "generate")
    assert (account.images_limit, account.requests_per_s) == (5, 0)
    account = accounts.admit(caller(f"Bearer {usual}"), "generate")
    assert (account.images_limit, account.requests_per_s) == (100, 3.0)


@pytest.mark.parametrize("fault", ["missing", "empty", "other key", "no authority"])
def test_certificates_that_cannot_be_used_are_refused_by_file(fault: str, tmp_path: Path) -> None:
    authority = trustme.CA()
    cert, key, ca = tmp_path / "tls.crt", tmp_path / "tls.key", tmp_path / "ca.crt"
    issued = authority.issue_cert("localhost")
    issued.private_key_pem.write_to_path(key)
    cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    authority.cert_pem.write_to_path(ca)
    Certificates(cert, key, ca, print)
    if fault == "missing":
        key.unlink()
    elif fault == "empty":
        cert.write_bytes(b"")
    elif fault == "other key":
        authority.issue_cert("localhost").private_key_pem.write_to_path(key)
    else:
        ca.write_text("nothing")
    together = r"--tls-cert .*tls\.crt.*--tls-key .*tls\.key.*--tls-client-ca "
    with pytest.raises(SettingsError, match=r"--tls-key .*tls\.key" if fault == "missing" else together):
        Certificates(cert, key, ca, print)


def test_an_encrypted_key_is_refused_and_not_asked_about(tmp_path: Path) -> None:
    cert, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    issued = trustme.CA().issue_cert("localhost")
    cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415  # comes with trustme; this test alone needs it

    plain = serialization.load_pem_private_key(issued.private_key_pem.bytes(), None)
    key.write_bytes(
        plain.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")
        )
    )
    with pytest.raises(SettingsError, match="encrypted"):
        Certificates(cert, key, None, print)


def test_a_renewed_certificate_replaces_the_old_one_once_no_handshake_is_half_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """grpc/grpc#36693: the core freed the old one while another thread began a handshake with it, and crashed."""
    pems, slept = CertificateFiles(tmp_path), list[float]()
    monkeypatch.setattr(tls, "time", SimpleNamespace(sleep=slept.append))
    monkeypatch.setattr(tls.grpc, "dynamic_ssl_server_credentials", lambda given, fetch, **_: fetch)
    fetch: Any = Certificates(pems.cert, pems.key, None, print).credentials()
    assert fetch() is None
    assert not slept, "nothing waits where nothing is new"
    pems.renew()
    wait_until(lambda: fetch() is not None)
    assert slept == [tls.SETTLES_S]
    assert fetch() is None
    assert slept == [tls.SETTLES_S]
