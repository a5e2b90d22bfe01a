"""One idea of a secret, by name and by looks, and who asks for it."""

import json
import logging
from collections.abc import Iterator

import pytest

from raylign.boundary.secrets import (
    REDACTED,
    holds_secret,
    is_secret,
    names_secret,
    secrets_in,
    without_credentials,
    without_secrets,
)
from raylign.config import OnlineDpoConfig
from raylign.config.base import Block
from raylign.report.console import PlainLines
from raylign.scoring.process import child_environment
from raylign.tracking.facts import publishable, redacted
from raylign.tracking.mlflow_store import shown
from recipes.commands.failures import complain

HUSH = "hush1234hush"
NAMES = (
    *("DB_PASS", "PGPASSWORD", "PGPASSFILE", "GITHUB_PAT", "AZURE_STORAGE_CONNECTION_STRING", "MYSQL_PWD", "DB_PW"),
    *("HF_TOKEN", "OPENAI_API_KEY", "OPENAI_APIKEY", "apiKey", "accessToken", "Authorization", "AWS_SECRET_ACCESS_KEY"),
    *("AWS_SESSION_TOKEN", "hub.token", "x-api-key", "SMTP_PASS", "REDIS_PASSWORD2", "GPG_PASSPHRASE", "PGPASS"),
    *("GOOGLE_APPLICATION_CREDENTIALS", "SENTRY_DSN", "SLACK_WEBHOOK_URL", "BASIC_AUTH", "SSH_AUTH_SOCK", "NETRC"),
    *("CONN_STR", "MONGO_CONNSTR", "SESSION_COOKIE", "GITHUBTOKEN", "DJANGO_SECRET", "STORAGE_SAS", "rootpass"),
    *("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "client_secret", "privateKey", "AccountKey", "KUBECONFIG", "API_KEYS"),
)
NO_NAMES = (
    *("PATH", "PYTHONPATH", "PWD", "OLDPWD", "HOME", "LANG", "TOKENIZERS_PARALLELISM", "RAY_AUTH_MODE", "COMPASS"),
    *("max_new_tokens", "sampling.max_prompt_tokens", "tokenizer", "scoring.api_key_env", "eos_token", "pad_token"),
    *("bypass", "overpasses", "keyboard", "monkey", "KEYMAP", "author", "patience", "passage"),
    *("CUDA_VISIBLE_DEVICES", "VLLM_LOGGING_LEVEL", "RAY_JOB_STOP_WAIT_TIME_S", "OMP_NUM_THREADS", "session"),
)
LOOKS = (
    f"https://me:{HUSH}@host/simple",
    f"https://{HUSH}@host/simple",
    f"pkg @ git+https://me:{HUSH}@host/r.git",
    f"--extra-index-url https://__token__:{HUSH}@host/simple",
    f"git+ssh://me:{HUSH}@host/r.git",
    f"postgresql://me:{HUSH}@host/db",
    f"https://host/x?access_token={HUSH}&y=1",
    f"https://host/x?y=1&sig={HUSH}",
    f"https://bucket/x?X-Amz-Signature={HUSH}",
    f"DefaultEndpointsProtocol=https;AccountName=n;AccountKey={HUSH}==;EndpointSuffix=x",
    f"host=db user=me password={HUSH}",
    f"Server=db;Pwd={HUSH};",
    f"HF_TOKEN={HUSH}",
    f'{{"api_key": "{HUSH}"}}',
    f"{{'password': '{HUSH}'}}",
    f"Authorization: Bearer {HUSH}",
    f"authorization: basic {HUSH}",
    "ghp_" + "a1" * 18,
    "github_pat_" + "a1" * 30,
    "glpat-" + "a1" * 10,
    "hf_" + "aB" * 17,
    "sk-proj-" + "aB1_" * 10,
    "sk-ant-" + "aB1_" * 10,
    "AKIA" + "ABCD2345" * 2,
    "xoxb-1234-5678-abcdef",
    "AIza" + "a1-_b" * 7,
    f"//registry.npmjs.org/:_authToken={HUSH}",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abc",
    "-----BEGIN OPENSSH PRIVATE KEY-----\nabc\n-----END OPENSSH PRIVATE KEY-----",
    "-----BEGIN PRIVATE KEY-----\nabc",
)
NO_LOOKS = (
    *("", "token", "platform", "torch==2.13.0", "git+ssh://git@github.com/o/r.git", "git@github.com:o/r.git"),
    *("http://mlflow:5000/path", "postgresql://host/db?sslmode=require", "RAY_AUTH_MODE=token", "me@example.org"),
    *("a" * 64, "0123456789abcdef" * 4, "max_new_tokens=64", "scoring.api_key_env=JUDGE_KEY", "pad_token=<|end|>"),
    "tracking.password: unknown key; did you mean 'experiment'?",
    "set RAY_AUTH_MODE=token and give the cluster's token in RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token",
    "round 1: held-out score 0.12, 3 preferences, 12 s, risk-adjusted task-specific-and-long-hyphenated-words",
)


@pytest.mark.parametrize("name", NAMES)
def test_names_of_secrets(name: str) -> None:
    assert names_secret(name) and is_secret(name, "x")


@pytest.mark.parametrize("name", NO_NAMES)
def test_names_of_other_things(name: str) -> None:
    assert not names_secret(name)


def blocks(kind: type[Block]) -> Iterator[type[Block]]:
    yield kind
    for below in kind.__subclasses__():
        yield from blocks(below)


def test_no_option_is_taken_for_a_secret() -> None:
    names = {name for block in blocks(Block) for name in block.model_fields}
    assert len(names) > 100 and [name for name in names if names_secret(name)] == []
    values = publishable(OnlineDpoConfig().model_dump(mode="json"))
    assert [name for name, value in values.items() if REDACTED in value] == []


@pytest.mark.parametrize("text", LOOKS)
def test_looks_of_secrets(text: str) -> None:
    assert holds_secret(text) and is_secret("NAME", text)
    hidden = without_secrets(f"before {text} after", {})
    assert HUSH not in hidden and hidden != f"before {text} after" and hidden.startswith("before ")
    assert without_secrets(hidden, {}) == hidden, "what is hidden stays as it is"


@pytest.mark.parametrize("text", NO_LOOKS)
def test_looks_of_other_things(text: str) -> None:
    assert not holds_secret(text)
    assert without_secrets(text, {}) == text


@pytest.mark.parametrize(
    "part",
    [
        "a",
        "a-",
        "/",
        "://",
        "?a",
        "&a=",
        "eyJ",
        "sk-",
        "hf_",
        "authorization ",
        "-----BEGIN ",
        "password=",
        '"a":',
        "@",
    ],
)
def test_hostile_text_is_read_to_its_end(part: str) -> None:
    """In linear time; anything else would take hours."""
    assert HUSH not in without_secrets(f"{part * 50_000} password={HUSH}", {})


def test_the_values_of_secret_variables_are_hidden_wherever_they_stand() -> None:
    environment = {"DB_PASS": HUSH, "SHORT_KEY": "the", "PLACE": "host"}
    assert without_secrets(f"the {HUSH}{HUSH} on host", environment) == f"the {REDACTED}{REDACTED} on host"


def test_an_address_loses_its_credentials_and_stays_an_address() -> None:
    assert without_credentials("postgresql://me:pa@ss@host:5432/db") == "postgresql://host:5432/db"
    assert without_credentials("git+ssh://git@host/r") == "git+ssh://git@host/r"


def test_the_places_of_secrets_in_a_tree() -> None:
    tree = {
        "env_vars": {"DB_PASS": "x", "PLACE": f"http://u:{HUSH}@h", "EMPTY_TOKEN": "", "LANG": "C", "N": 7},
        "pip": {"packages": ["torch", f"pkg @ https://u:{HUSH}@h/x"]},
        "container": {"run_options": ["-e", f"HF_TOKEN={HUSH}"]},
        f"https://u:{HUSH}@h": 1,
    }
    places = list(secrets_in(tree))
    assert places == [
        "env_vars.DB_PASS",
        "env_vars.PLACE",
        "pip.packages.1",
        "container.run_options.1",
        "https://h",
    ]


@pytest.mark.parametrize(
    "name", ["DB_PASS", "PGPASSWORD", "GITHUB_PAT", "AZURE_STORAGE_CONNECTION_STRING", "SENTRY_DSN"]
)
def test_everybody_has_the_same_idea(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert child_environment({name: HUSH, "LANG": "C"}, []).keys() == {"LANG", "PYTHONPATH"}
    assert child_environment({"PLACE": f"AccountKey={HUSH}"}, []).keys() == {"PYTHONPATH"}
    for published in (publishable({"a": {name: HUSH}}), redacted({"a": [{name: HUSH}]})):
        assert HUSH not in json.dumps(published)
    assert publishable({"note": f"AccountKey={HUSH}"}) == {"note": f"AccountKey={REDACTED}"}
    monkeypatch.setenv(name, HUSH)
    line = logging.LogRecord("raylign", logging.INFO, "", 0, "said %s", (HUSH,), None)
    assert PlainLines("%(message)s").format(line) == f"said {REDACTED}"
    complain(f"error: {HUSH} AccountKey=other1234")
    assert capsys.readouterr().err == f"error: {REDACTED} AccountKey={REDACTED}\n"
    assert shown(f"401: {HUSH}") == f"401: {REDACTED}"
