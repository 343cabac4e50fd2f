"""Experiment trackers that watch: each framework with each seed is a run of theirs, fed while it goes on.

No result depends on them. What they write lies in the run folder, and leaves the machine only where the tracker's own
variables say so (`MLFLOW_TRACKING_URI`, `WANDB_MODE=online`, `TRACKIO_SPACE_ID`); their telemetry is off.
"""

from __future__ import annotations

import contextlib
import contextvars
import io
import logging
import os
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from .config import Config, TrackerName, flat
from .errors import ConfigError
from .run import OnRound

PACKAGES: dict[TrackerName, str] = {
    "trackio": "trackio",
    "wandb": "wandb",
    "tensorboard": "torch.utils.tensorboard",
    "mlflow": "mlflow",
}
PROJECT = "fedtrio"
Parameters = Mapping[str, Any]
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}
QUIET |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}  # runs don't wait for a server


class Tracked(Protocol):
    """One run as a tracker holds it."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers after a round."""
        ...

    def finish(self, failed: bool) -> None:
        """Nothing more will come."""
        ...


class Trackers:
    """The trackers of a configuration; one that breaks is named once and left out, and the runs go on.

    Raises ConfigError where a package is missing, before anything is computed.
    """

    def __init__(self, config: Config, out: Path | None) -> None:
        os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
        self._config, self._out, self._names = config, out, list(config.report_to)
        self._open: dict[tuple[str, int], dict[TrackerName, Tracked]] = {}
        for name in self._names:
            try:
                import_module(PACKAGES[name])
            except ImportError as error:
                raise ConfigError(f"report_to: {name} is not installed here: pip install 'fedtrio[{name}]'") from error

    def watching(self, then: OnRound) -> OnRound:
        """`then`, and the trackers are told too."""

        def told(framework: str, seed: int, entry: Mapping[str, Any]) -> None:
            self._each(framework, seed, lambda run: run.log(_numbers(entry, "round"), entry["round"]))
            then(framework, seed, entry)

        return told if self._names else then

    def finished(self, entry: Mapping[str, Any]) -> None:
        """A run has ended: what it cost in all."""
        which = entry["framework"], entry["seed"]
        known = {*entry["curve"][-1], "right.texts"}  # told already, or no cost
        self._each(*which, lambda run: run.log(_numbers(entry, "seed", "rounds", *known), entry["rounds"]))
        self._each(*which, lambda run: run.finish(False))
        self._open.pop(which, None)

    def _each(self, framework: str, seed: int, tell: Callable[[Tracked], None]) -> None:
        opened = self._open.setdefault((framework, seed), {})
        for name in list(self._names):
            try:
                with contextlib.redirect_stdout(io.StringIO()):  # which may be for results.json alone
                    if name not in opened:
                        opened[name] = self._start(name, framework, seed)
                    tell(opened[name])
            except Exception as error:  # whatever it is, an hour of computing is worth more
                self._names.remove(name)
                said = " ".join(str(error).split())[:300]
                logging.getLogger(__name__).warning(
                    "fedtrio: report_to: %s broke and is left out: %s: %s", name, type(error).__name__, said
                )

    def _start(self, name: TrackerName, framework: str, seed: int) -> Tracked:
        group, folder = (self._out.resolve().name, self._out) if self._out else (PROJECT, Path("runs"))
        folder.mkdir(parents=True, exist_ok=True)
        settings = self._config.model_dump(mode="json", exclude={"report_to"})
        parameters = {"framework": framework, "seed": seed, **flat(settings)}
        package = import_module(PACKAGES[name])
        return START[name](package, f"{framework}-{seed}", group, parameters, folder)

    def close(self) -> None:
        """Runs that were broken off have failed."""
        for which in list(self._open):
            self._each(*which, lambda run: run.finish(True))


def _numbers(entry: Mapping[str, Any], *but: str) -> dict[str, float]:
    """What can be drawn of an entry of results.json."""
    found = {key: value for key, value in flat(entry).items() if key not in but}
    return {key: float(value) for key, value in found.items() if isinstance(value, int | float)}


# The four -------------------------------------------------------------------------------------------------------------


class TensorBoard:
    """`<run folder>/tensorboard/<framework>-<seed>`, with the configuration as hyper-parameters."""

    def __init__(self, package: Any, name: str, group: str, parameters: Parameters, folder: Path) -> None:
        place = folder / "tensorboard" / name
        self._writer = package.SummaryWriter(str(place), purge_step=1)  # a run that goes on tells all its rounds anew
        plain = {key: v if isinstance(v, int | float | str) else str(v) for key, v in parameters.items()}
        kinds, start, self._end = package.summary.hparams(plain, {"accuracy": 0, "loss": 0})
        self._add(kinds)
        self._add(start)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Scalars."""
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def finish(self, failed: bool) -> None:
        """Close the file."""
        if not failed:
            self._add(self._end)
        self._writer.close()

    def _add(self, summary: Any) -> None:
        self._writer._get_file_writer().add_summary(summary)


class MLflow:
    """A run of the experiment `fedtrio`, by default in `<run folder>/mlflow.db`."""

    def __init__(self, package: Any, name: str, group: str, parameters: Parameters, folder: Path) -> None:
        logging.getLogger("mlflow.store").setLevel(logging.WARNING)  # which tells of every table it makes
        self._entities = package.entities
        own = f"sqlite:///{folder.resolve() / 'mlflow.db'}"
        self._client = package.MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or own)
        found = self._client.get_experiment_by_name(PROJECT)
        experiment = found.experiment_id if found else self._client.create_experiment(PROJECT)
        self._id = self._client.create_run(experiment, run_name=f"{group}/{name}").info.run_id
        params = [package.entities.Param(key, str(value)[:6000]) for key, value in parameters.items()]
        for first in range(0, len(params), 100):  # as many as one call takes
            self._client.log_batch(self._id, params=params[first : first + 100])

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Metrics."""
        now, metric = int(1000 * time.time()), self._entities.Metric
        self._client.log_batch(self._id, metrics=[metric(key, value, now, step) for key, value in values.items()])

    def finish(self, failed: bool) -> None:
        """End the run."""
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


class Wandb:
    """A run of the project `fedtrio`, offline in `<run folder>/wandb` unless `WANDB_MODE` says otherwise."""

    def __init__(self, package: Any, name: str, group: str, parameters: Parameters, folder: Path) -> None:
        self._run = package.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT, name=f"{group}/{name}", group=group, dir=str(folder),
            config=dict(parameters), mode=os.environ.get("WANDB_MODE") or "offline",
            reinit="create_new",  # several frameworks may be under way
            settings=package.Settings(
                console="off", disable_git=True, disable_code=True, x_disable_stats=True, x_disable_meta=True,
                x_save_requirements=False, x_disable_machine_info=True,
            ),
        )  # fmt: skip

    def log(self, values: Mapping[str, float], step: int) -> None:
        """A row of the history."""
        self._run.log(dict(values), step=step)

    def finish(self, failed: bool) -> None:
        """End the run."""
        self._run.finish(exit_code=int(failed))


class Trackio:
    """A run of the project `fedtrio` in Trackio's own folder (`TRACKIO_DIR`), as `trackio show` looks for it there."""

    def __init__(self, package: Any, name: str, group: str, parameters: Parameters, folder: Path) -> None:
        options = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
        self._run = contextvars.Context().run(  # of its own, or it would end the run that began before
            lambda: package.init(PROJECT, f"{group}/{name}", group, config=dict(parameters), **options)
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        """A row of the project's table."""
        self._run.log(dict(values), step=step)

    def finish(self, failed: bool) -> None:
        """Wait until all is written."""
        self._run.finish()


START: dict[TrackerName, Callable[[Any, str, str, Parameters, Path], Tracked]] = {
    "trackio": Trackio,
    "wandb": Wandb,
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
}
