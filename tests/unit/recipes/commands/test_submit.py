"""What `raylign submit` refuses before a cluster hears of it, and what it sends."""

import json
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import ray
from typer.testing import CliRunner, Result

from raylign.errors import ConfigError, PlacementError
from recipes.commands.cli import app
from recipes.commands.submit import PLAIN_RUNTIME_ENV, RUNTIME_ENV, cluster_address, connect, follow, prepare
from tests.faults import record

ROOT = Path(__file__).resolve().parents[4]
RECIPE = ROOT / "recipes/sentiment_smollm2.yaml"
SHARED = "run.dir=/shared/runs"
Asked = list[Mapping[str, str]]
CURE = "set it in the environment of the cluster's nodes before `ray start`"


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in list(os.environ):
        if name.startswith("RAY_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")


@pytest.fixture
def asked() -> Asked:
    return []


@contextmanager
def job_server(status: int, asked: Asked) -> Iterator[str]:
    """The address of a server that answers every request with `status` and keeps its headers."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(dict(self.headers))
            body = json.dumps({"ray_version": ray.__version__}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            """Quiet."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def submit(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["submit", *arguments], env={"COLUMNS": "200"})


def test_the_job_is_the_same_command_in_the_uploaded_folder() -> None:
    job = prepare(RECIPE, [SHARED, "prompts.system=two words; rm -rf /"], ROOT)
    assert job.entrypoint == (
        "python -m recipes.commands.cli run recipes/sentiment_smollm2.yaml run.dir=/shared/runs "
        "'prompts.system=two words; rm -rf /'"
    )
    assert job.working_dir == ROOT
    assert job.runtime_env["env_vars"] == {"PYTHONPATH": "platform", "RAY_JOB_STOP_WAIT_TIME_S": "60"}


def test_a_folder_without_a_runtime_environment_gets_the_plain_one(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("run: {dir: /shared/runs}")
    assert prepare(tmp_path / "mine.yaml", (), tmp_path).runtime_env == PLAIN_RUNTIME_ENV


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((SHARED, "sampling.temprature=1"), "did you mean 'temperature'?"),
        ((), "run.dir=runs is relative, and the job's own folder is a temporary copy"),
    ],
)
def test_what_the_job_would_refuse_is_refused_here(settings: tuple[str, ...], message: str, asked: Asked) -> None:
    with job_server(200, asked) as address:
        result = submit(str(RECIPE), *settings, "--working-dir", str(ROOT), "--address", address)
    assert (result.exit_code, asked) == (1, [])
    assert message in result.stderr and "Traceback" not in result.output


def test_the_name_of_a_variable_with_a_key_may_be_part_of_a_command() -> None:
    judge = ("scoring={type: judge, base_url: 'http://judge:8000/v1', model: m}", "scoring.api_key_env=JUDGE_KEY")
    assert prepare(RECIPE, [SHARED, *judge], ROOT).entrypoint.endswith(" scoring.api_key_env=JUDGE_KEY")
    with pytest.raises(ConfigError, match="not the name of an environment variable") as caught:
        prepare(RECIPE, [SHARED, judge[0], "scoring.api_key_env=hush-1234"], ROOT)
    assert "hush-1234" not in str(caught.value)


def test_a_recipe_outside_the_uploaded_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not in .*, the folder that is uploaded; copy it there"):
        prepare(RECIPE, [SHARED], tmp_path)


@pytest.mark.parametrize(
    "setting",
    [
        "model.hub_token=hush-1234",
        "tracking.password=hush-1234",
        "scoring.apiKey=hush-1234",
        "tracking.uri=http://me:hush-1234@mlflow:5000",
        "prompts.source=https://me:hush-1234@host/prompts.jsonl",
        "prompts.source=https://host/prompts.jsonl?sig=hush-1234",
        "scoring={type: judge, api_key: hush-1234}",
    ],
)
def test_secrets_never_become_part_of_a_command(setting: str, asked: Asked) -> None:
    with job_server(200, asked) as address:
        result = submit(str(RECIPE), SHARED, setting, "--working-dir", str(ROOT), "--address", address)
    assert (result.exit_code, asked) == (1, [])
    assert CURE in result.stderr and "hush-1234" not in result.output
    assert setting.partition("=")[0] in result.stderr


@pytest.fixture
def with_runtime_env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Writes the runtime environment of a folder with a recipe, and goes there; gives the recipe."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / RUNTIME_ENV).parent.mkdir()
    (tmp_path / "mine.yaml").write_text("run: {dir: /shared/runs}")

    def write(text: str) -> Path:
        (tmp_path / RUNTIME_ENV).write_text(text)
        return tmp_path / "mine.yaml"

    return write


@pytest.mark.fault
@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("env_vars: {HF_TOKEN: hush-1234}", "env_vars.HF_TOKEN"),
        ("env_vars: {DATABASE: 'postgresql://me:hush-1234@host/db'}", "env_vars.DATABASE"),
        ("env_vars: {DB_PASS: hush-1234}", "env_vars.DB_PASS"),
        ("env_vars: {PGPASSWORD: hush-1234}", "env_vars.PGPASSWORD"),
        ("env_vars: {GITHUB_PAT: hush-1234}", "env_vars.GITHUB_PAT"),
        ("env_vars: {AZURE_STORAGE_CONNECTION_STRING: 'AccountKey=hush-1234'}", "env_vars.AZURE_STORAGE_CONN"),
        ("env_vars: {STORE: 'AccountName=a;AccountKey=hush-1234=='}", "env_vars.STORE"),
        ("pip: ['pkg @ git+https://me:hush-1234@host/r.git']", "pip.0"),
        ("pip: {packages: ['--index-url https://me:hush-1234@host/simple', pkg]}", "pip.packages.0"),
        ("pip: requirements.txt", "pip.packages.1"),
        ("conda: {dependencies: [pip, {pip: ['https://me:hush-1234@host/p.whl']}]}", "conda.dependencies.1.pip.0"),
        ("container: {image: i, run_options: ['-e', 'HF_TOKEN=hush-1234']}", "container.run_options.1"),
        ("config: {setup_timeout_seconds: 9}\npy_modules: ['https://host/m.zip?token=hush-1234']", "py_modules.0"),
    ],
)
def test_secrets_anywhere_in_the_runtime_environment_are_refused(
    text: str, place: str, with_runtime_env: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "requirements.txt").write_text("torch\n--extra-index-url https://me:hush-1234@host/simple\n")
    with pytest.raises(ConfigError, match=f"ray_runtime_env.yaml: {place}.* looks like a secret.*nodes") as caught:
        prepare(with_runtime_env(text), (), tmp_path)
    assert "hush-1234" not in str(caught.value)
    record("secrets in a runtime environment", place, lost="nothing: refused before the cluster hears of it")


def test_a_runtime_environment_without_secrets_is_sent_as_it_is(
    with_runtime_env: Callable[[str], Path], tmp_path: Path
) -> None:
    text = "env_vars: {TOKENIZERS_PARALLELISM: 'false'}\npip: ['pkg @ git+ssh://git@host/r.git', torch]\n"
    environment = prepare(with_runtime_env(text), (), tmp_path).runtime_env
    assert environment["env_vars"] == {"TOKENIZERS_PARALLELISM": "false"} and len(environment["pip"]) == 2


@pytest.mark.parametrize(
    "text", ["pip: none.txt", "pip: 7", "env_vars: {A: 7}", "conda: none.yaml", "pip: []\nconda: {}"]
)
def test_what_ray_would_refuse_is_refused_with_the_file(
    text: str, with_runtime_env: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="ray_runtime_env.yaml: Ray cannot read it .*; correct the file"):
        prepare(with_runtime_env(text), (), tmp_path)


@pytest.mark.parametrize("text", ["[", "- one", "env_vars: [one]"])
def test_a_broken_runtime_environment_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / RUNTIME_ENV).parent.mkdir()
    (tmp_path / RUNTIME_ENV).write_text(text)
    (tmp_path / "mine.yaml").write_text("run: {dir: /shared/runs}")
    with pytest.raises(ConfigError, match=f"{tmp_path}/deploy/ray_runtime_env.yaml"):
        prepare(tmp_path / "mine.yaml", (), tmp_path)


def test_the_option_wins_over_the_variables_in_their_order() -> None:
    both = {"RAY_API_SERVER_ADDRESS": "http://a:1", "RAY_ADDRESS": "http://b:2"}
    assert cluster_address("https://c:3/", both) == "https://c:3"
    assert cluster_address(None, both) == "http://a:1"
    assert cluster_address(None, both | {"RAY_API_SERVER_ADDRESS": ""}) == "http://b:2"


@pytest.mark.parametrize(
    ("option", "environment", "message"),
    [
        (None, {}, "no cluster is named; give --address http://HEAD:8265"),
        (None, {"RAY_ADDRESS": "auto"}, "RAY_ADDRESS=auto is no job server"),
        ("10.0.0.1:6379", {}, "--address=10.0.0.1:6379 is no job server"),
        ("ray://head:10001", {}, "--address=ray://head:10001 is no job server"),
        ("http://me:hush@head:8265", {}, "--address has credentials in it"),
    ],
)
def test_other_addresses_are_refused(option: str | None, environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        cluster_address(option, environment)
    assert "hush" not in str(caught.value)


def test_a_cluster_that_is_gone_or_hangs_is_named_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.commands.submit.REACH_S", 1.0)
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{mute.getsockname()[1]}"
        with pytest.raises(PlacementError, match=f"{address} does not answer within 1 s .*; correct the address"):
            connect(address)
        mute.listen()
        with pytest.raises(PlacementError, match=f"{address} does not answer within 1 s .no whole answer in time"):
            connect(address)


def test_token_mode_without_a_token_stops_before_the_cluster_is_asked(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with (
        job_server(200, asked) as address,
        pytest.raises(PlacementError, match="there is no token; set RAY_AUTH"),
    ):
        connect(address)
    assert asked == []


def test_no_token_goes_to_a_cluster_unless_it_is_asked_for(asked: Asked, tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("f" * 64)
    with job_server(200, asked) as address:
        connect(address)
    assert asked and not any("f" * 64 in value for headers in asked for value in headers.values())


@pytest.mark.parametrize("status", [401, 403])
def test_a_cluster_with_a_token_says_how_to_give_it(status: int) -> None:
    with job_server(status, []) as address, pytest.raises(PlacementError, match="asks for a token and got none; set "):
        connect(address)


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`raylign submit` to a cluster that takes the job, with `follow` for what comes then."""

    def run(follow: Callable[..., int], *options: str) -> Result:
        monkeypatch.setattr("recipes.commands.submit.connect", lambda address: None)
        monkeypatch.setattr("recipes.commands.submit.start", lambda client, address, job: "raysubmit_1")
        monkeypatch.setattr("recipes.commands.submit.follow", follow)
        where = ("--working-dir", str(ROOT), "--address", "http://head:8265")
        return submit(str(RECIPE), SHARED, *where, *options)

    return run


def interrupted(*arguments: Any) -> int:
    raise KeyboardInterrupt


def talking(client: Any, address: str, job: str, show: Callable[[str], None]) -> int:
    show("[bold]line[/bold]\n\x1b[2J")
    return 75


def test_without_waiting_it_ends_once_the_job_has_an_id(submitted: Callable[..., Result]) -> None:
    result = submitted(interrupted, "--no-wait")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "submitted to http://head:8265: job raysubmit_1",
        "follow it: ray job logs --follow --address http://head:8265 raysubmit_1",
        "stop it:   ray job stop --address http://head:8265 raysubmit_1",
    ]


def test_ctrl_c_ends_the_printing_and_not_the_job(submitted: Callable[..., Result]) -> None:
    result = submitted(interrupted)
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (130, "job raysubmit_1 goes on")


def test_the_output_of_a_job_cannot_steer_the_terminal(submitted: Callable[..., Result]) -> None:
    result = submitted(talking)
    assert result.exit_code == 75
    assert "[bold]line[/bold]\n\\x1b[2J" in result.stdout
    assert result.stdout.endswith("ended with status 75; the same command goes on with it\n")


class Severed:
    """A client whose connection breaks in the middle of the output."""

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        yield "round 1\n"
        raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")


def test_a_lost_connection_says_that_the_job_goes_on_and_how_to_look_again() -> None:
    client: Any = Severed()
    shown: list[str] = []
    with pytest.raises(PlacementError, match=r"1006\); it goes on .*: ray job logs --follow --address http://h"):
        follow(client, "http://h", "raysubmit_1", shown.append)
    assert shown == ["round 1\n"]
