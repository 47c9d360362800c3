"""Redaction of keys and tokens from all output."""

from __future__ import annotations

import html
import json
import random
import string
import time
import urllib.parse

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rose_exp.runtime.errors import RoseExpError, SettingsError
from rose_exp.runtime.redaction import HIDDEN, is_secret_name, redact, redacted
from rose_exp.tracking import RunRecord

from ..conftest import REPOSITORY
from ..report.records import record

WORD = string.ascii_letters + string.digits


def secrets_of(seed: int) -> dict[str, str]:
    """Return one random secret in the format of each service."""
    generator = random.Random(seed)

    def draw(count: int, letters: str = WORD) -> str:
        return "".join(generator.choices(letters, k=count))

    return {
        "hugging_face": f"hf_{draw(34)}",
        "wandb": draw(40, "0123456789abcdef"),
        "wandb_v1": f"wandb_v1_{draw(40)}",
        "openai": f"sk-{draw(48)}",
        "openai_project": f"sk-proj-{draw(20)}_{draw(20)}-{draw(8)}",
        "anthropic": f"sk-ant-api03-{draw(40)}",
        "github": f"ghp_{draw(36)}",
        "github_fine": f"github_pat_{draw(22)}_{draw(59)}",
        "gitlab": f"glpat-{draw(20)}",
        "aws": f"AKIA{draw(16, string.ascii_uppercase + string.digits)}",
        "google": f"AIza{draw(35)}",
        "slack": f"xoxb-{draw(12, string.digits)}-{draw(12, string.digits)}-{draw(24)}",
        "jwt": f"eyJ{draw(30)}.eyJ{draw(60)}.{draw(43)}",
        "stripe": f"sk_live_{draw(24)}",
        "npm": f"npm_{draw(36)}",
    }


PLACES = (
    "{}",
    "401 for {}.",
    "tags=[a,{},b]",
    "'{}'",
    '{{"a": "{}"}}',
    "https://host/x?y={}&z=1",
    "({})",
    "<b>{}</b>",
    "x: {}\ny",
)


@pytest.mark.parametrize("seed", range(20))
def test_tokens_of_services_are_recognized_by_their_format(seed):
    for service, secret in secrets_of(seed).items():
        for place in PLACES:
            assert redacted(place.format(secret)) == place.format(HIDDEN), service
        assert redact({secret: [secret, {"a": secret}]}) == {HIDDEN: [HIDDEN, {"a": HIDDEN}]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:pass@hub.example/x", "https://***@hub.example/x"),
        ("postgresql://me:p@ss:w@db:5432/x", "postgresql://***@db:5432/x"),
        ("redis://:pass@db", "redis://***@db"),
        ("https://0123456789abcdefghijklmn@git.example/x", "https://***@git.example/x"),
        ("Authorization: Bearer abcdefghijklmnop.q", "Authorization: Bearer ***"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\nabc=\n-----END RSA PRIVATE KEY-----\nx", "***\nx"),
        ("https://hooks.slack.com/services/T0/B0/abc", "https://***"),
    ],
)
def test_credentials_in_urls_headers_and_key_files_are_redacted(text, expected):
    assert redacted(text) == expected


@pytest.mark.parametrize(
    "name",
    [
        *(
            "SECRET",
            "TOKEN",
            "PASSWORD",
            "PASSWD",
            "CREDENTIALS",
            "KEY",
            "hf_token",
            "HF_TOKEN",
            "hfToken",
            "HFToken",
            "hf-token",
        ),
        *("apiKey", "API_KEY", "APIKEY", "AWS_SECRET_ACCESS_KEY", "my.password", "hydra.job.env_set.WANDB_API_KEY", "token2"),
        *("Secret", "secretSauce", "SECRET_BASE", "db_passwd", "GOOGLE_CREDENTIALS", "SSH_KEY", "+x.token", "passphrase"),
    ],
)
def test_names_of_secrets_are_recognized_as_words(name):
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "tokens",
            "keys",
            "tokenizer",
            "monkey",
            "Tokenizer",
            "KEYBOARD",
            "keyed",
            "turkey",
            "secretary",
            "passwords_seen",
            "x",
        ),
        *("expert_tokens", "tokens_sha256", "max_new_tokens", "bos_token", "eos_token_id", "pad_token", "sort_key", "KeyError"),
        *("HF_TOKEN_PATH", "KEY_FILE", "calibration.tokens", "key.path", "token.window", "keystone", "", "...", "Schlüssel"),
    ],
)
def test_ordinary_names_are_not_names_of_secrets(name):
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("+my.password=ab", "+my.password=***"),
        ("api_key='a b c' next", "api_key='***' next"),
        ('{"token": "a b"}', '{"token": "***"}'),
        ("{'clientSecret': 'x', 'y': 1}", "{'clientSecret': '***', 'y': 1}"),
        ("HF_TOKEN: abc", "HF_TOKEN: ***"),
        ("GET /x?token=abcdefgh&n=1", "GET /x?token=***&n=1"),
        ("--api-key=abc", "--api-key=***"),
        ("sort(key=len, reverse=True)", None),
        ("missing key: model.layers.0.weight", None),
        ("token: 5 of 8", None),
        ("x.api_key: expected a value, got none", None),
        ("{a: 1, api_key: abc, b: 2}", "{a: 1, api_key: ***, b: 2}"),
        ("KeyError: 'model.layers'", None),
        ("tokens=128 keys: abcdefghijkl", None),
    ],
)
def test_values_of_secret_names_are_redacted_in_text(text, expected):
    assert redacted(text) == (text if expected is None else expected)


def test_values_of_secret_names_are_redacted_in_data():
    data = {"db": {"password": "x", "port": 5, "pin_token": 1234}, "api_key": ["a", "b"], "secret": None, "tokens": 7}
    expected = {"db": {"password": HIDDEN, "port": 5, "pin_token": HIDDEN}, "api_key": [HIDDEN, HIDDEN], "secret": None}
    assert redact(data) == expected | {"tokens": 7}
    assert redact(["+a.token=x y,z", "method=rose"]) == ["+a.token=***", "method=rose"]
    assert redact({"use_token": True, "num_key_value_heads": 4}) == {"use_token": True, "num_key_value_heads": 4}


@pytest.mark.parametrize("value", ["0123456789abcdef", "p\"a\\s s'w<ö>rd&x", "line one of it\nand another line", "päss wörd €"])
def test_values_of_environment_variables_are_redacted_in_every_notation(value, monkeypatch):
    monkeypatch.setenv("MY_SECRET", value)
    forms = [
        value,
        json.dumps(value),
        repr(value),
        html.escape(value),
        urllib.parse.quote(value),
        urllib.parse.quote_plus(value),
    ]
    for form in [*forms, json.dumps({"a": [value]}), repr({"a": value}), f"failed for {value!r}"]:
        clean = redacted(f"a {form} b")
        assert HIDDEN in clean
        assert not any(part in clean for part in form.strip("\"'").split("\n"))
    assert yaml.safe_load(yaml.safe_dump(redact({"x": f"a {value}", "y": [value]}))) == {"x": f"a {HIDDEN}", "y": [HIDDEN]}


def test_short_values_of_environment_variables_are_redacted_only_as_words(monkeypatch):
    monkeypatch.setenv("DB_PASSWORD", "hunt3r")
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    monkeypatch.setenv("MAIN_KEY", "rose")  # an ordinary word
    monkeypatch.setenv("TOKENS", "0123456789abcdef")
    assert redacted("x hunt3r, hunt3rs abc rose 0123456789abcdef") == "x ***, hunt3rs abc rose 0123456789abcdef"


@pytest.mark.parametrize(
    "text",
    [
        "seed=0 model=llama",
        "sha256 " + "ab" * 32,
        "http://localhost:8000/x",
        "git@github.com:owner/name.git",
        "ssh://git@host/x",
        "revision 0123456789abcdef0123456789abcdef01234567",
        "meta-llama/Llama-2-7b-hf@0123456789abcdef0123456789abcdef01234567",
        "models--x/snapshots/0123456789abcdef0123456789abcdef01234567/config.json",
        "model.revision=0123456789abcdef0123456789abcdef01234567",
        "risk-averse-and-long-hyphenated-words",
        "hf_transfer sk-learn AKIA",
        "model.layers.0.self_attn.key_proj.weight",
    ],
)
def test_ordinary_text_is_unchanged(text):
    assert redacted(text) == text


def test_commits_are_kept_and_keys_of_the_same_format_are_not():
    digits = "0123456789abcdef0123456789abcdef01234567"
    data = {"revision": f"{digits}+changes", "model": {"commit": digits}, "tags": [digits]}
    assert redact(data) == data | {"tags": [HIDDEN]}


def test_records_documentation_and_configurations_are_unchanged():
    data = record("ROSE", 26.0)
    assert redact(data) == data
    for path in [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *(REPOSITORY / "conf").rglob("*.yaml")]:
        text = path.read_text()
        assert redacted(text) == text, path


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=60), st.text(max_size=60), st.integers(0, 100), st.data())
def test_redaction_is_idempotent_and_removes_planted_secrets(before, after, seed, data):
    secret = data.draw(st.sampled_from(sorted(secrets_of(seed).values())))
    clean = redacted(f"{before} {secret} {after}")
    assert secret not in clean or "revision" in before
    assert redacted(clean) == clean


def test_redaction_takes_linear_time():
    start = time.perf_counter()
    for text in ("a", "a=b:", "://a:", "token=", "-----BEGIN PRIVATE KEY-----", "eyJaaaaaaaa.", "0", "a.", "sk-", "'", "key='"):
        redacted(text * (200_000 // len(text)))
    assert time.perf_counter() - start < 30


def test_run_record_contains_no_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_SECRET", 'quoted "secret" \\ value')
    token = secrets_of(0)["hugging_face"]
    config = {
        "model": {"path": f"https://user:{token}@hub"},
        "tags": [token, 'quoted "secret" \\ value'],
        "x": {"password": "pw"},
    }
    run = RunRecord(tmp_path, config, "Dense", "x")
    run.fail(RuntimeError(f"no access with {token}"))
    data = json.loads((tmp_path / "run.json").read_text())
    assert data["error"] == "RuntimeError: no access with ***"
    assert data["config"] == {"model": {"path": "https://***@hub"}, "tags": [HIDDEN, HIDDEN], "x": {"password": HIDDEN}}


def test_errors_contain_no_secrets():
    token = secrets_of(0)["github"]
    assert str(RoseExpError(f"no access with {token}")) == "no access with ***"
    error = SettingsError([f"x.token: no such setting, got {token!r}"])
    assert error.problems == ["x.token: no such setting, got '***'"]
    assert token not in str(error)
