"""`sa3-mcp`: what an agent may touch, set and spend, and that it gets from audio to an adapter by itself."""

import asyncio
import importlib.util
import json
import shutil
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mcp
import pytest

from helpers.audio import noise, write_clip
from helpers.stub_commands import write_stubs
from sa3train.cli import budget
from sa3train.cli.budget import Budget
from sa3train.cli.eval import build_parser as eval_parser
from sa3train.cli.mcp import build_server
from sa3train.cli.mcp_tools import Tools
from sa3train.core import processes
from sa3train.core.errors import SA3Error
from sa3train.studio.server.workspace import Workspace


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tools:
    """Tools with two minutes and stubs of the commands that train and evaluate."""
    monkeypatch.setattr(sys, "executable", str(write_stubs(tmp_path / "bin")))
    write_clip(tmp_path / "audio" / "a.wav", noise(0.5), "noise")
    latents = tmp_path / "work" / "latents"
    workspace = Workspace.create(tmp_path / "work", [tmp_path / "audio"])
    latents.mkdir()
    (latents / "index.json").write_text('{"format": "sa3train-latents"}')
    return Tools(workspace, Budget(workspace.folder, 2, 1))


def wait_until_over(tools: Tools, run: str) -> dict[str, Any]:
    while (shown := tools.watch_run(run, 1))["state"] not in ("finished", "stopped", "crashed", "failed"):
        pass
    return shown


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("audit", {"source": "/etc"}),
        ("audit", {"source": "../secret"}),
        ("audit", {"source": "{audio}/link"}),
        ("encode", {"source": "{audio}", "out": "/tmp/elsewhere"}),
        ("encode", {"source": "{audio}", "out": "{audio}/latents"}),
        ("encode", {"source": "{audio}", "model": "/etc"}),
        ("encode", {"source": "{audio}", "model": "medium"}),
        ("train", {"data": "latents", "run": "../outside"}),
        ("train", {"data": "latents", "run": "{audio}/run"}),
        ("train", {"data": "latents", "run": "runs/a", "start_from": "/etc/passwd", "recipe": "continue"}),
        ("train", {"data": "latents", "run": "runs/a", "settings": ["hydra.run.dir=/tmp"]}),
        ("train", {"data": "latents", "run": "runs/a", "settings": ["run_dir=/tmp/x"]}),
        ("train", {"data": "latents", "run": "runs/a", "settings": ["adapter.start_from=/etc/passwd"]}),
        ("train", {"data": "latents", "run": "runs/a", "settings": ["data.more=[{path:/etc}]"]}),
        ("train", {"data": "latents", "run": "runs/a", "settings": ["optimizer._target_=os.system"]}),
        ("train", {"data": "latents", "run": "runs/a", "settings": ["+optimizer.x._target_=os.system"]}),
        ("train", {"data": "latents", "run": "runs/a", "settings": ["logger=wandb"]}),
        ("train", {"data": "latents", "run": "runs/a", "settings": ["seed=1\nlogger=wandb"]}),
        ("train", {"data": "latents", "run": "runs/a", "settings": ["seed=${oc.env:HOME}"]}),
        ("train", {"data": "latents", "run": "runs/a", "recipe": "sweep"}),
        ("sweep", {"data": "latents", "folder": "../outside", "settings": ["adapter.rank=4,8"]}),
        ("sweep", {"data": "latents", "folder": "runs/s", "settings": ["adapter.rank=4,8", "run_dir=choice(/a,/b)"]}),
        ("sweep", {"data": "latents", "folder": "runs/s", "settings": ["adapter.start_from=choice(/etc/passwd,/b)"]}),
        ("generate", {"prompt": "x", "out": "/tmp/x.wav"}),
        ("generate", {"prompt": "x", "out": "x.wav", "adapters": ["/etc/passwd"]}),
        ("evaluate", {"adapters": ["/etc/passwd"], "data": "latents"}),
        ("evaluate", {"adapters": [], "data": "latents"}),
        ("show_run", {"run": "/etc"}),
        ("watch_job", {"job": "../../.."}),
    ],
)
def test_what_is_outside_is_refused_and_nothing_starts(
    tools: Tools, tmp_path: Path, tool: str, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "audio" / "link").symlink_to(tmp_path / "secret")
    monkeypatch.setattr(processes, "start", lambda *_, **__: pytest.fail("a process was started"))
    place = str(tmp_path / "audio")
    given = {
        name: value.replace("{audio}", place) if isinstance(value, str) else value for name, value in arguments.items()
    }
    with pytest.raises(SA3Error):
        getattr(tools, tool)(**given)
    assert not tools.budget.describe()["running"]


def test_a_link_inside_a_source_that_leads_out_is_refused(tools: Tools, tmp_path: Path) -> None:
    (tmp_path / "secret.wav").touch()
    (tmp_path / "audio" / "b.wav").symlink_to(tmp_path / "secret.wav")
    with pytest.raises(SA3Error, match="outside"):
        tools.audit(str(tmp_path / "audio"))
    adapter = tmp_path / "work" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").symlink_to(tmp_path / "secret.wav")
    with pytest.raises(SA3Error, match="outside"):
        tools.evaluate([str(adapter)], str(tmp_path / "work"))


def test_errors_reach_the_client_in_words_and_results_as_data(tools: Tools, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tools, "_check_folder", lambda self, path, what: self.workspace.resolve_folder(path, what))

    async def use(client: Any) -> None:
        names = {tool.name for tool in (await client.list_tools()).tools}
        verbs = {"sweep", "list_runs", "show_run", "watch_run", "stop_run", "compare_runs", "best_run"}
        assert names >= verbs | {"status", "audit", "encode", "plan", "train", "evaluate", "generate"}
        refused = await client.call_tool("audit", {"source": "/etc"})
        assert refused.is_error and "outside the folders" in refused.content[0].text
        for call, meant in (
            ({"settings": ["adaptr.rank=4"]}, "Did you mean adapter.rank?"),
            ({"settings": ["logger.name=csv"]}, "Remove it."),
            ({"step": 4}, "train has no argument step. Did you mean steps?"),
            ({"recipe": "stlye"}, "Did you mean style?"),
        ):
            refused = await client.call_tool("train", {"data": "latents", "run": "runs/a"} | call)
            assert refused.is_error and meant in refused.content[0].text
        arguments = {"data": "latents", "run": "runs/a", "settings": ["adapter.rank=4"], "wait_seconds": 30}
        shown = (await client.call_tool("train", arguments)).structured_content
        assert shown["state"] == "finished" and shown["step"] == 8
        again = await client.call_tool("train", {**arguments, "run": "runs/b", "settings": ["optimizer.lr=1e-5"]})
        assert not again.is_error, "the next job may start as soon as one has ended"
        best = (await client.call_tool("best_run", {"runs": ["runs/a", "runs/b"]})).structured_content
        assert best["run"].endswith("a") and best["adapter"].endswith(("a@8", "adapter.safetensors"))
        listed = (await client.call_tool("list_runs", {})).structured_content["result"]
        assert [run["state"] for run in listed] == ["finished"] * 2

    run_client(build_server(tools), use)


def test_a_running_job_ends_with_its_time(tools: Tools, tmp_path: Path) -> None:
    use_slow_stubs(tmp_path)
    tools.budget.seconds = 6.0
    tools.train("latents", "runs/a", wait_seconds=0)
    with pytest.raises(SA3Error, match="one job runs at a time"):
        tools.train("latents", "runs/b")
    shown = wait_until_over(tools, "runs/a")
    assert shown["state"] == "stopped" and "--minutes" in shown["stopped_because"]
    tools.budget.close()
    with pytest.raises(SA3Error, match="--minutes"):
        tools.train("latents", "runs/b")


def test_a_sweep_is_ranked_and_ends_with_all_it_started(
    tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space: Any = {"data": "latents", "folder": "runs/s", "settings": ["adapter.rank=choice(4,8)"]}
    job = tools.sweep(**space, trials=2)
    while (job := tools.watch_job(job["job"], 5))["state"] == "running":
        pass
    assert [row["adapter.rank"] for row in job["result"]["trials"]] == ["4", "8"], job
    assert job["result"]["best"]["strength"] == 1.0
    use_slow_stubs(tmp_path)
    job = tools.sweep(**space | {"folder": "runs/t"}, wait_seconds=0)["job"]
    first = tmp_path / "work" / "runs" / "t" / "trial-000"
    while not (first / "run.json").is_file():
        time.sleep(0.1)
    process = processes.find_process(processes.read_record(tools.workspace.home / "jobs" / job))
    assert process is not None
    monkeypatch.setattr(budget, "GUARD_SECONDS", 0.0)
    process.kill()  # as no one should: its run is left
    process.wait()
    with pytest.raises(SA3Error, match="is running"):
        tools.train("latents", "runs/b")
    while tools.budget.describe()["running"]:
        time.sleep(0.1)
    assert processes.get_running_pid(first) is None, "the guard ended it, with the server there"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SA3Error, match=r"sa3train\[sweep\]"):
        tools.sweep(**space)


def test_negative_strengths_are_no_flags(tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / "work" / f"{name}.safetensors").touch()
    started: list[list[str]] = []
    monkeypatch.setattr(tools.jobs, "start", lambda kind, command, *_, **__: started.append(command))
    tools.evaluate(["a.safetensors"], "latents", strengths=[-1, 0.5])
    tools.generate("x", "x.wav", adapters=["a.safetensors", "b.safetensors"], strengths=[-0.5, -2])
    assert eval_parser().parse_args(started[0][1:]).strengths == (-1.0, 0.5)
    assert [part for part in started[1] if part.endswith(("=-0.5", "=-2.0"))] == [
        f"{tmp_path / 'work' / name}.safetensors={strength}" for name, strength in (("a", -0.5), ("b", -2.0))
    ]


def test_no_job_is_said_to_run_that_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = Budget(tmp_path, 2, 1)
    given._take("audit-1")
    given._folder, running = tmp_path, [tmp_path]
    monkeypatch.setattr(budget, "_list_running", lambda folder: running)
    assert given.describe()["running"] == "audit-1"
    running.clear()
    assert given.describe()["running"] == ""


def test_a_running_job_ends_with_its_disk(tools: Tools, tmp_path: Path) -> None:
    use_slow_stubs(tmp_path)
    tools.train("latents", "runs/a", wait_seconds=0)
    with (tools.workspace.folder / "big").open("wb") as file:
        file.truncate(950_000_000)
    assert "--gigabytes" in wait_until_over(tools, "runs/a")["stopped_because"]


def test_a_running_job_ends_with_its_server(tools: Tools, tmp_path: Path) -> None:
    use_slow_stubs(tmp_path)
    tools.train("latents", "runs/a", wait_seconds=0)
    tools.budget.close()  # closes the pipe, as the system does for a server that is killed
    assert "sa3-mcp ended" in wait_until_over(tools, "runs/a")["stopped_because"]


def test_a_job_that_does_not_stop_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(write_stubs(tmp_path / "bin", pause=30)))
    processes.start(tmp_path / "run", ["sa3-train", f"run_dir={tmp_path / 'run'}"])
    before = time.monotonic()
    budget.guard_job(tmp_path / "run", tmp_path, time.time() + 1, 10**9, 10**9, threading.Event())
    assert processes.get_running_pid(tmp_path / "run") is None and time.monotonic() - before < 20


def use_slow_stubs(tmp_path: Path) -> None:
    """Make a step take long enough to be stopped in."""
    shutil.rmtree(tmp_path / "bin")
    write_stubs(tmp_path / "bin", pause=2.0)


def run_client(server: Any, use: Callable[[Any], Awaitable[None]]) -> None:
    async def main() -> None:
        async with mcp.Client(server) as client:
            await use(client)

    with ThreadPoolExecutor(1) as pool:  # a browser test may have left a loop running in this thread
        pool.submit(asyncio.run, main()).result()


@pytest.mark.slow
def test_an_agent_gets_from_a_folder_of_audio_to_a_picked_adapter(tmp_path: Path) -> None:
    for number in range(6):
        write_clip(
            tmp_path / "audio" / f"{number}.wav", noise(0.6 + 0.1 * number, seed=number, peak=0.3), f"noise {number}"
        )
    command = ["-m", "sa3train.cli.mcp", "--workspace", str(tmp_path / "work"), "--folder", str(tmp_path / "audio")]
    server = mcp.StdioServerParameters(command=sys.executable, args=[*command, "--minutes", "20", "--gigabytes", "2"])

    async def use(client: Any) -> None:
        async def call(tool: str, **arguments: Any) -> Any:
            found = await client.call_tool(tool, arguments)
            assert not found.is_error, found.content
            while "job" in found.structured_content and found.structured_content["state"] == "running":
                found = await client.call_tool("watch_job", {"job": found.structured_content["job"]})
            assert found.structured_content.get("state") != "failed", found.structured_content
            return found.structured_content

        source = (await call("status"))["audio"][0]
        assert (await call("audit", source=source))["result"]["rejected"] == 0
        await call("encode", source=source, out="latents", heldout_share=0.4)
        settings = ["callbacks.demos.enabled=false", "callbacks.validation.every=2", "callbacks.validation.clips=2"]
        settings += ["scheduler.warmup_steps=1", "trainer.threads=1", "data.num_workers=0"]
        given: dict[str, Any] = {"data": "latents", "steps": 4, "settings": settings}
        plan = (await call("plan", **given))["result"]["plan"]
        assert any("rank" in line for line in plan) and any(line.startswith("Time: about") for line in plan)
        run = await call("train", run="runs/first", **given)
        while run["state"] in ("starting", "running"):
            run = await call("watch_run", run="runs/first")
        assert run["state"] == "finished" and run["step"] == 4, run
        picked = (await call("evaluate", adapters=["runs/first"], data="latents", generate=0))["result"]
        best = min(picked["candidates"], key=lambda row: row["loss"])
        made = await call(
            "generate", prompt="noise 1", out="results/noise.wav", duration=0.5, adapters=[best["adapter"]], steps=2
        )
        recorded = json.loads(Path(made["result"]["settings"]).read_text())
        assert Path(made["result"]["audio"]).is_file() and "runs/first" in json.dumps(recorded)
        assert (await call("status"))["budget"]["minutes_left"] < 20

    run_client(server, use)
