"""Secrets are never written, and hyperparameters always are."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradwatch.probe.redact import MAX_TEXT, REDACTED, clean, jsonable, redact

SECRET = "hunter2hunter2"


@pytest.mark.parametrize(
    "name",
    [
        "token", "hub_token", "HF_TOKEN", "hfToken", "access-token", "auth.token", "github_token", "tokenSecret",
        "password", "DB_PASSWORD", "dbPassword", "passwd", "smtp_pass", "db_pwd", "passphrase",
        "secret", "client_secret", "clientSecret", "secrets", "AWS_SECRET_ACCESS_KEY", "awsSecretAccessKey",
        "key", "api_key", "apiKey", "APIKey", "apikey", "API_KEYS", "openai-api-key", "wandb_key", "x-api-key",
        "private_key", "signing_key", "account_key", "accesskey", "ssh_key", "api_key_prod",
        "credential", "credentials", "googleCredentials", "Authorization", "proxy-authorization", "Cookie",
        "bearer", "jwt", "my_token", "session_token", "webhook",
    ],
)  # fmt: skip
def test_a_value_under_a_secret_name_is_redacted(name: str) -> None:
    assert redact({name: SECRET}) == {name: REDACTED}
    assert redact({"outer": [{"inner": {name: SECRET}}]}) == {"outer": [{"inner": {name: REDACTED}}]}
    assert redact(SECRET, key=name) == REDACTED
    assert SECRET not in json.dumps(clean({name: SECRET}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("key_dim", 64), ("num_keys", 8), ("n_key_value_heads", 4), ("token_count", 10**9), ("max_tokens", 4096),
        ("vocab_tokens", ["a", "b"]), ("pad_token_id", 0), ("eos_token", "</s>"), ("pad_token", "[PAD]"),
        ("bos_token", "bos"), ("tokens_per_batch", 8192), ("tokenizer", "gpt2"), ("token_embedding", "learned"),
        ("key_padding_mask", "causal"), ("sort_key", "length"), ("primary_key", "user_id"), ("metric_key", "auc"),
        ("label_key", "churned"), ("keyboard", "qwerty"), ("monkey", "see"), ("turkey", "trot"),
        ("password_length_feature", 12), ("num_secrets", 3), ("token", 5), ("key", 7), ("token", None),
        ("use_token", True), ("author", "ada"), ("authority", "x"), ("bypass", "relu"), ("forward_pass", "eager"),
        ("compass", "north"), ("keep_prob", 0.5), ("keys", ["user", "item"]), ("tokens_seen", 3),
        ("max_new_tokens", 17), ("image_token", "img"), ("lr", 3e-4), ("secretary", "bob"), ("monkey_patch", "no"),
        ("rotary_key_scale", 2.0), ("key_value_heads", 8), ("passes", 3),
    ],
)  # fmt: skip
def test_a_hyperparameter_that_sounds_like_a_secret_is_kept(name: str, value: object) -> None:
    assert redact({name: value}) == {name: value}


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("postgres://bob:pw@db.example:5432/x", "postgres://db.example:5432/x"),
        ("see https://bob@host/path for more", "see https://host/path for more"),
        ("mysql://bob:p@ss@host/x", "mysql://host/x"),
        ("mysql://bob:p/ss@host/x", "mysql://host/x"),
        ("http://:pw@mlflow.example", "http://mlflow.example"),
        ("two http://a:b@c http://d:e@f", "two http://c http://f"),
        ("http://host:8080/path/@user", "http://host:8080/path/@user"),
        ("https://host/a?x=1&token=abc&y=2", f"https://host/a?x=1&token={REDACTED}&y=2"),
        ("https://s3/a?X-Amz-Signature=0af1", f"https://s3/a?X-Amz-Signature={REDACTED}"),
        ("host=db user=bob password=pw dbname=x", f"host=db user=bob password={REDACTED} dbname=x"),
        ('{"password": "a b c", "lr": 1}', f'{{"password": "{REDACTED}", "lr": 1}}'),
        ("Authorization: Bearer abc.def", f"Authorization: {REDACTED}"),
        ("curl -H 'Bearer abcdefgh12'", f"curl -H 'Bearer {REDACTED}'"),
        ("train.py --hf-token abc --lr 1", f"train.py --hf-token {REDACTED} --lr 1"),
        ("train.py --password=abc --max-tokens=5", f"train.py --password={REDACTED} --max-tokens=5"),
        ("key: the thing that opens", "key: the thing that opens"),
        ("KeyError: 'token'", "KeyError: 'token'"),
        ("token_count=5 key_dim=64", "token_count=5 key_dim=64"),
        ("/home/ada/runs/a@b:c", "/home/ada/runs/a@b:c"),
    ],
)
def test_text_loses_its_secrets_and_keeps_the_rest(text: str, kept: str) -> None:
    assert redact(text) == kept
    assert redact({"note": [text]}) == {"note": [kept]}
    assert redact(kept) == kept  # a second pass changes nothing


SHAPES = [
    "AKIA" + "IOSFODNN7EXAMPLE",
    "ghp_" + "a1B2" * 9,
    "github_pat_" + "a1B2" * 10,
    "glpat-" + "a1B2" * 5,
    "hf_" + "aBcD" * 8,
    "sk-ant-" + "a1B2" * 8,
    "xoxb-" + "123456789012-abc",
    "AIza" + "a1B2c" * 7,
    "eyJhbGciOiJI.eyJzdWIiOiIx.c2lnbmF0dXJl",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIE\nabc\n-----END RSA PRIVATE KEY-----",
    "-----BEGIN OPENSSH PRIVATE KEY-----\nb3Bl",
]


@pytest.mark.parametrize("secret", SHAPES)
def test_an_unmistakable_secret_is_redacted_wherever_it_stands(secret: str) -> None:
    assert redact(secret) == REDACTED
    assert redact({"note": f"with {secret}"}) == {"note": f"with {REDACTED}"}
    assert list(redact({secret: 1})) == [REDACTED]
    assert secret[:8] not in json.dumps(jsonable("x" * (MAX_TEXT - 12) + " " + secret))  # no half of one


def test_a_commit_and_ordinary_names_have_no_secret_shape() -> None:
    for text in (
        "da39a3ee5e6b4b0d3255bfef95601890afd80709",
        "bert-base-uncased",
        "risk-averse",
        "eyJ",
        "2026-01-01",
    ):
        assert redact(text) == text


def test_whole_containers_under_a_secret_name_go() -> None:
    assert redact({"credentials": {"user": "bob", "pin": 1234}}) == {"credentials": REDACTED}
    assert redact({"api_keys": ["a", "b"]}) == {"api_keys": REDACTED}
    assert redact({"password": 1234}) == {"password": REDACTED}
    assert redact({"token": {"max": 5, "pad": "<pad>"}}) == {"token": {"max": 5, "pad": "<pad>"}}


def test_environment_lists_and_argument_vectors() -> None:
    env = [{"name": "DB_PASSWORD", "value": "pw"}, {"name": "LR", "value": "0.1"}]
    assert redact(env) == [{"name": "DB_PASSWORD", "value": REDACTED}, {"name": "LR", "value": "0.1"}]
    argv = ["train.py", "--token", "abc", "--lr", "0.1", "--api-key=abc"]
    assert redact(argv) == ["train.py", "--token", REDACTED, "--lr", "0.1", f"--api-key={REDACTED}"]


class Color(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


@dataclasses.dataclass
class Inner:
    rate: float
    api_key: str


class Omega(Mapping[str, Any]):
    """Like OmegaConf: a mapping with values that are missing."""

    def __iter__(self) -> Iterator[str]:
        return iter(("lr", "missing"))

    def __len__(self) -> int:
        return 2

    def __getitem__(self, key: str) -> Any:
        if key == "missing":
            raise LookupError("mandatory value ???")
        return 0.1


class Hostile:
    def __repr__(self) -> str:
        raise RuntimeError("never asked")

    __str__ = __repr__


def test_anything_becomes_plain_json() -> None:
    value = {
        "enum": Color.RED, "int_enum": Level.HIGH, "path": Path("/data/x"), "numpy": np.float32(0.5),
        "array": np.zeros((2, 3)), "dtype": torch.bfloat16, "device": torch.device("cpu"), "set": {3},
        "record": Inner(0.1, "k"), "namespace": argparse.Namespace(lr=1, _private=2), "omega": Omega(),
        "nan": float("nan"), "inf": -np.inf, "big": 10**40, "bytes": b"abc", "fn": json.dumps, "cls": Inner,
        "hostile": Hostile(), 5: "int key", ("a", 1): "tuple key", "tensor": torch.arange(3.0),
    }  # fmt: skip
    plain = clean(value)
    json.dumps(plain, allow_nan=False)
    assert plain["enum"] == "red"
    assert plain["int_enum"] == 3
    assert plain["path"] == "/data/x"
    assert plain["numpy"] == 0.5
    assert plain["array"] == "<array float64[2, 3]>"
    assert plain["dtype"] == "bfloat16"
    assert plain["set"] == [3]
    assert plain["record"] == {"rate": 0.1, "api_key": REDACTED}
    assert plain["namespace"] == {"lr": 1}
    assert plain["omega"] == {"lr": 0.1, "missing": "<unreadable>"}
    assert (plain["nan"], plain["inf"]) == ("nan", "-inf")
    assert plain["fn"] == "json.dumps"
    assert plain["5"] == "int key"
    assert plain["hostile"].startswith("<")
    assert plain["tensor"] == "<tensor float32[3] on cpu>"


def test_a_tensor_is_described_and_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object, **__: object) -> None:
        raise AssertionError("read a tensor")

    for method in ("item", "tolist", "__repr__", "__float__", "__bool__", "numpy"):
        monkeypatch.setattr(torch.Tensor, method, read)
    assert clean({"lr": torch.tensor(0.1)}) == {"lr": "<tensor float32[] on cpu>"}


def test_cycles_depth_and_size_are_bounded() -> None:
    loop: dict[str, Any] = {}
    loop["self"] = loop
    assert jsonable(loop) == {"self": "<cycle>"}
    deep: Any = 1
    for _ in range(10_000):
        deep = [deep]
    text = json.dumps(clean({"deep": deep, "wide": list(range(10**6)), "long": "x" * 10**6, "many": [[0] * 400] * 400}))
    assert len(text) < 100_000
    shared = [1]
    assert jsonable([shared, shared]) == [[1], [1]]  # twice is no cycle


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.integers(), inner, max_size=4),
    max_leaves=20,
)


@given(json_like)
def test_whatever_comes_is_written_as_json_and_a_second_pass_changes_nothing(value: Any) -> None:
    plain = clean(value)
    json.dumps(plain, allow_nan=False).encode()
    assert clean(plain) == plain


@given(
    st.text(min_size=8, alphabet="abcdefgh0123456789!#$%^*()"),
    st.sampled_from(["password", "apiKey", "X-Auth-Token"]),
)
def test_a_planted_secret_never_comes_out(secret: str, name: str) -> None:
    for value in (
        {name: secret},
        {"a": [{"b": {name: secret}}]},
        {"url": f"https://u:{secret.replace('#', '')}@host/"},
    ):
        assert secret not in json.dumps(clean(value), ensure_ascii=False)
