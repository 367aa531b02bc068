"""What an agent can do through `sa3-mcp`: each public method of `Tools` is a tool, its docstring what the agent reads.

A tool checks its paths against the workspace, starts one of our commands by its list of arguments, and reads files.
Nothing that an agent writes reaches a shell, and no setting that reaches beyond a run is accepted.
"""

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from sa3train.cli.budget import REASONS, STOPPED_FOR, Budget
from sa3train.cli.mcp_jobs import Jobs, format_rows, iterate_until
from sa3train.cli.train_config import TrainConfig
from sa3train.core import processes
from sa3train.core.config import is_known, list_keys
from sa3train.core.errors import ConfigError, SA3Error
from sa3train.core.files import path_exists
from sa3train.core.text import suggest_name
from sa3train.data.encode.settings import EncodeSettings
from sa3train.data.shards.index import summarize_data
from sa3train.models import hub
from sa3train.reports import comparison, runs
from sa3train.reports.run_files import holds_run
from sa3train.studio.data.jobs import build_audit_command, build_encode_command, get_audit_dir
from sa3train.studio.runs import estimate
from sa3train.studio.runs.estimate import RunRequest
from sa3train.studio.server import folders
from sa3train.studio.server.workspace import Workspace

REFUSED_GROUPS = ("logger",)
"""Settings of the studio's form that reach the network."""


class Tools:
    """The tools of a server.

    Args:
        workspace: The folder that is written to, and those that are read.
        budget: Time and disk.
    """

    def __init__(self, workspace: Workspace, budget: Budget) -> None:
        self.workspace, self.budget, self.jobs = workspace, budget, Jobs(workspace, budget)

    def status(self) -> dict[str, Any]:
        """List what there is: folders of audio, latents and runs, models at hand, and the time and disk left.

        Returns:
            Paths, names, and the budget.
        """
        found = folders.find_folders(self.workspace)
        return {
            "writes_to": str(self.workspace.folder),
            "reads": [str(folder) for folder in self.workspace.sources],
            "audio": [str(path) for path in found.audio],
            "latents": [str(path) for path in found.latents],
            "runs": [str(path) for path in found.runs],
            "models": self._list_models(),
            "budget": self.budget.describe(),
        }

    def audit(
        self, source: str, captions: Literal["required", "optional", "auto"] = "required", wait_seconds: float = 30
    ) -> dict[str, Any]:
        """Check a folder of audio before it is encoded: problems, and what to do about each.

        Args:
            source: Folder of audio.
            captions: "optional" also accepts clips without a text file of the same name, "auto" composes theirs from
                tags, names and sound.
            wait_seconds: How long to wait for it, at most 50.

        Returns:
            Its state, progress and result. While it is running, call watch_job with its name.
        """
        path = self._check_folder(source, "folder of audio")
        command = build_audit_command(self.workspace, path, captions, None)
        facts = {"source": str(path), "out": str(get_audit_dir(self.workspace, path))}
        return self.jobs.start("audit", [*command, "--progress-json"], wait_seconds, **facts)

    def encode(
        self,
        source: str,
        out: str = "latents",
        model: str = "nano-base",
        captions: Literal["required", "optional", "auto"] = "required",
        heldout_share: float = 0.1,
        wait_seconds: float = 30,
    ) -> dict[str, Any]:
        """Encode a folder of audio to latents, on which adapters are trained.

        Args:
            source: Folder of audio.
            out: Folder in the workspace.
            model: Model that will be trained.
            captions: As for audit.
            heldout_share: Share of the clips that are never trained on, to judge adapters by.
            wait_seconds: How long to wait for it, at most 50.

        Returns:
            Its state, progress and result. While it is running, call watch_job with its name.
        """
        path, target = self._check_folder(source, "folder of audio"), self.workspace.resolve_output(out)
        settings = EncodeSettings(split=heldout_share, captions=captions)
        command = build_encode_command(path, target, self._check_model(model), settings)
        return self.jobs.start("encode", [*command, "progress=json"], wait_seconds, source=str(path), out=str(target))

    def plan(
        self,
        data: str,
        model: str = "nano-base",
        recipe: str = "style",
        steps: int | None = None,
        settings: list[str] | None = None,
        trial: bool = True,
        wait_seconds: float = 45,
    ) -> dict[str, Any]:
        """Estimate what a training run would cost, before it is started.

        Args:
            data: Folder of latents.
            model: Base model.
            recipe: Name of the recipe.
            steps: Optimizer steps. None: the recipe's.
            settings: As for train.
            trial: Make a few real steps to measure time and memory.
            wait_seconds: How long to wait for it, at most 50.

        Returns:
            The command and lines of the plan; with a trial its state, progress and result, as of audit.
        """
        request = self._make_request(data, model, "runs/plan", recipe, steps, settings, None)
        with self.budget.spend("plan"):
            config, summary = estimate.compose_config(request), summarize_data(request.data)
            rows = estimate.describe_plan(config, summary, estimate.count_uncaptioned(request.data))
        if not trial:
            return {"command": request.build_command(), "plan": format_rows(rows)}
        name = self.jobs.make_name("plan")
        command = estimate.make_trial(request, self.jobs.get_trial_dir(name)).build_command()
        facts = {"plan": rows, "config": config, "data": str(request.data)}
        return self.jobs.start("plan", command, wait_seconds, name, **facts)

    def train(
        self,
        data: str,
        run: str,
        model: str = "nano-base",
        recipe: str = "style",
        steps: int | None = None,
        settings: list[str] | None = None,
        start_from: str | None = None,
        wait_seconds: float = 10,
    ) -> dict[str, Any]:
        """Train an adapter on latents. The run goes on after this returns: use watch_run.

        Args:
            data: Folder of latents.
            run: New folder in the workspace, such as runs/first.
            model: Base model.
            recipe: Name of the recipe, such as style or continue.
            steps: Optimizer steps. None: the recipe's.
            settings: Such as ["adapter.rank=8", "optimizer.lr=1e-3", "callbacks.validation.every=50"], of the groups
                data, adapter, loss, optimizer, scheduler, trainer, callbacks and seed.
            start_from: Adapter to train further, with recipe "continue".
            wait_seconds: How long to wait for it, at most 50.

        Returns:
            As of show_run.
        """
        request = self._make_request(data, model, run, recipe, steps, settings, start_from)
        command, folder = request.build_command(), request.run_dir
        if (left := runs.load_run(folder)) is not None and left.state == "failed":
            runs.dismiss_run(folder)
        self.budget.launch(f"train {folder.name}", folder, lambda: runs.start_run(folder, command))
        return self.watch_run(str(folder), wait_seconds)

    def sweep(
        self,
        data: str,
        folder: str,
        settings: list[str],
        model: str = "nano-base",
        recipe: str = "style",
        steps: int | None = None,
        trials: int = 8,
        wait_seconds: float = 30,
    ) -> dict[str, Any]:
        """Search settings with Optuna: one run for each point, hopeless ones stopped early, lowest held-out loss first.

        The same call continues a sweep that was stopped, and trains no point twice. list_runs shows its runs meanwhile.

        Args:
            data: Folder of latents.
            folder: Folder of the sweep in the workspace, such as runs/sweep.
            settings: As for train, some with several values: "adapter.rank=choice(4,8)",
                "optimizer.lr=tag(log,interval(1e-4,1e-2))". The type of adapter has one value in a sweep,
                such as "adapter=dora-rows", never a choice.
            model: Base model.
            recipe: Name of the recipe.
            steps: Optimizer steps of each run. None: the recipe's.
            trials: Runs in all.
            wait_seconds: How long to wait for it, at most 50.

        Returns:
            Its state and result. While it is running, call watch_job with its name.

        Raises:
            ConfigError: Optuna is not installed.
        """
        if importlib.util.find_spec("optuna") is None:
            raise ConfigError('sweep needs Optuna. Ask the user to run: pip install "sa3train[sweep]"')
        request = self._make_request(data, model, folder, recipe, steps, settings, None)
        given = [word for word in request.build_command()[1:] if not word.startswith("run_dir=")]
        command = ["sa3-sweep", str(request.run_dir), *given, "--trials", str(int(trials)), "--json"]
        return self.jobs.start("sweep", command, wait_seconds, runs=str(request.run_dir))

    def resume_run(self, run: str, wait_seconds: float = 10) -> dict[str, Any]:
        """Resume a run that was stopped or interrupted, from its last checkpoint.

        Args:
            run: Run folder in the workspace.
            wait_seconds: How long to wait for it, at most 50.

        Returns:
            As of show_run.
        """
        folder = self._check_run(run, is_written=True)
        self.budget.launch(f"train {folder.name}", folder, lambda: runs.resume_run(folder))
        return self.watch_run(str(folder), wait_seconds)

    def evaluate(
        self,
        adapters: list[str],
        data: str,
        model: str = "nano-base",
        strengths: list[float] | None = None,
        generate: int = 4,
        wait_seconds: float = 45,
    ) -> dict[str, Any]:
        """Measure adapters against the base model on held-out clips, and pick the one and the strength to use.

        Args:
            adapters: Adapter files, RUN@STEP, or run folders for all their checkpoints.
            data: Folder of latents with held-out clips.
            model: Base model.
            strengths: Strengths to try (default 1).
            generate: Clips to generate with each; 0 measures the loss alone.
            wait_seconds: How long to wait for it, at most 50.

        Returns:
            Its state, progress and result. While it is running, call watch_job with its name.

        Raises:
            ConfigError: There are no adapters.
        """
        if not adapters:
            raise ConfigError("adapters is empty. Name adapter files or run folders.")
        command = ["sa3-eval", *(str(self._check_adapter(adapter)) for adapter in adapters)]
        command += ["--data", str(self._check_folder(data, "folder of latents")), "--model", self._check_model(model)]
        command += [f"--strengths={','.join(map(repr, map(float, strengths)))}"] if strengths else []
        command += ["--generate", str(int(generate)), "--pick", "--progress-json"]
        return self.jobs.start("evaluate", command, wait_seconds)

    def generate(
        self,
        prompt: str,
        out: str,
        model: str = "nano",
        duration: float = 6,
        adapters: list[str] | None = None,
        strengths: list[float] | None = None,
        seed: int = 0,
        steps: int | None = None,
        wait_seconds: float = 45,
    ) -> dict[str, Any]:
        """Generate audio from a prompt, with adapters if any.

        Args:
            prompt: The prompt.
            out: New WAV file in the workspace, such as results/first.wav.
            model: Model that generates.
            duration: Seconds of audio.
            adapters: As for evaluate, but no run folders without an adapter.
            strengths: One for each adapter (default 1).
            seed: Seed of the noise.
            steps: Sampling steps. None: the model's.
            wait_seconds: How long to wait for it, at most 50.

        Returns:
            Its state, progress and result. While it is running, call watch_job with its name.

        Raises:
            ConfigError: The file exists or is no WAV file, or the strengths are not as many as the adapters.
        """
        adapters = adapters or []
        if strengths is not None and len(strengths) != len(adapters):
            raise ConfigError("strengths needs one value for each adapter. Give as many, or leave it out.")
        found = self.workspace.resolve_output(out)
        if found.suffix != ".wav" or path_exists(found):
            raise ConfigError(f"out must be a new .wav file; {out} is not. Choose another name.")
        command = ["sa3-generate", "--model", self._check_model(model), f"--prompt={prompt}"]
        for adapter, strength in zip(adapters, strengths or [1.0] * len(adapters), strict=True):
            command += ["--lora", f"{self._check_adapter(adapter)}={float(strength)!r}"]
        sampling = ["--steps", str(int(steps))] if steps else []
        command += ["--duration", str(float(duration)), "--seed", str(int(seed)), *sampling, "-o", str(found)]
        return self.jobs.start("generate", command, wait_seconds, out=str(found))

    def watch_job(self, job: str, wait_seconds: float = 45) -> dict[str, Any]:
        """Wait for a job of audit, encode, sweep, evaluate or generate.

        Args:
            job: Its name.
            wait_seconds: How long to wait, at most 50.

        Returns:
            Its state, progress and result.
        """
        return self.jobs.watch(job, wait_seconds)

    def stop_job(self, job: str) -> dict[str, Any]:
        """Stop a job. The same call starts it again; an encode and a sweep go on where they were.

        Args:
            job: Its name.

        Returns:
            As of watch_job.
        """
        return self.jobs.stop(job)

    def list_runs(self) -> list[dict[str, Any]]:
        """List the training runs, running ones first.

        Returns:
            State, steps done and planned, speed and loss of each.
        """
        found = [run for run in runs.find_runs(self.workspace.roots) if not folders.leads_out(self.workspace, run.path)]
        return [{**asdict(run), "path": str(run.path)} for run in found]

    def show_run(self, run: str) -> dict[str, Any]:
        """Show a run.

        Args:
            run: Run folder.

        Returns:
            Its state, held-out loss against the base, adapters, and what that means in words.
        """
        return runs.describe_run(self._check_run(run))

    def watch_run(self, run: str, wait_seconds: float = 45) -> dict[str, Any]:
        """Wait until a run ends or the time is over.

        Args:
            run: Run folder.
            wait_seconds: How long to wait, at most 50.

        Returns:
            As of show_run.
        """
        folder = self._check_run(run)
        for _ in iterate_until(wait_seconds):
            found = runs.load_run(folder)
            is_over = found is None or not found.is_alive
            if is_over and processes.get_running_pid(folder) is None:  # its process ends a moment after the run
                break
        shown = runs.describe_run(folder)
        reason = processes.read_record(folder).get(STOPPED_FOR)
        is_over = shown["state"] not in runs.ALIVE
        return shown | ({"stopped_because": REASONS[reason]} if is_over and reason in REASONS else {})

    def stop_run(self, run: str) -> dict[str, Any]:
        """Stop a run; it saves its state first, and resume_run continues it.

        Args:
            run: Run folder in the workspace.

        Returns:
            As of show_run.
        """
        folder = self._check_run(run, is_written=True)
        runs.stop_run(folder)
        return runs.describe_run(folder)

    def compare_runs(self, runs: list[str]) -> list[dict[str, Any]]:
        """Compare runs, best first.

        Args:
            runs: Run folders.

        Returns:
            The settings that differ and the held-out losses of each.
        """
        return comparison.compare_runs([self._check_run(run) for run in runs])

    def best_run(self, runs: list[str]) -> dict[str, Any]:
        """Choose the run with the lowest held-out loss, and its adapter.

        Args:
            runs: Run folders.

        Returns:
            The run; its adapter, with step, strength and change of the loss against the base; what to know.
        """
        return comparison.choose_best([self._check_run(run) for run in runs])

    def _list_models(self) -> list[str]:
        return sorted({"nano", "nano-base", *hub.list_cached_names()})

    def _check_model(self, name: str) -> str:
        if name in hub.list_model_names() and name not in self._list_models():
            raise ConfigError(f"{name} is not downloaded. Choose from {', '.join(self._list_models())}, or a folder.")
        found = folders.resolve_model_name(self.workspace, name)
        if found not in hub.list_model_names() and name != self.workspace.model:  # the user's own may have links
            self._check_links(Path(found))
        return found

    def _check_folder(self, path: str, what: str) -> Path:
        found = self.workspace.resolve_folder(path, what)
        self._check_links(found)
        return found

    def _check_links(self, folder: Path) -> None:
        """Refuse a folder in which a link leads out: commands follow links."""
        for inside, below, names in os.walk(folder):
            for path in (Path(inside, name) for name in (*below, *names)):
                if path.is_symlink():
                    self.workspace.resolve(path)

    def _check_adapter(self, path: str) -> Path:
        if holds_run(self.workspace.resolve(path)):
            return self._check_run(path)
        found = folders.resolve_adapter(self.workspace, path)
        if found.is_dir():
            self._check_links(found)
        return found

    def _check_run(self, path: str, *, is_written: bool = False) -> Path:
        if is_written:
            self.workspace.resolve_output(path)
        folder = self.workspace.resolve_folder(path, "run folder")
        self._check_links(folder)
        if not runs.is_run(folder):
            raise SA3Error(f"{folder} contains no run. list_runs shows them.")
        return folder

    def _make_request(
        self, data: str, model: str, run: str, recipe: str, steps: int | None, settings: Sequence[str] | None,
        start_from: str | None,
    ) -> RunRequest:  # fmt: skip
        if recipe not in estimate.list_recipes():
            known = estimate.list_recipes()
            hint = suggest_name(recipe, known, f"Choose from {', '.join(known)}.")
            raise ConfigError(f"There is no recipe {recipe}. {hint}")
        for line in settings or []:
            key = line.partition("=")[0]
            if "\n" in line or not is_known(TrainConfig, key) or key.partition(".")[0] in REFUSED_GROUPS:
                allowed = () if is_known(TrainConfig, key) else {*estimate.SETTABLE_GROUPS} - {*REFUSED_GROUPS}
                near = [name for name in list_keys(TrainConfig) if name.partition(".")[0] in allowed]
                hint = suggest_name(key, near, "Remove it.")
                raise ConfigError(f"{line!r} is no setting of a run that an agent may make. {hint}")
        return RunRequest(
            recipe,
            self._check_folder(data, "folder of latents"),
            self._check_model(model),
            self.workspace.resolve_output(run),
            steps,
            estimate.parse_settings("\n".join(settings or [])),
            self._check_adapter(start_from) if start_from else None,
        )
