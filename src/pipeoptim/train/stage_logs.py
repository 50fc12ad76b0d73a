"""Where the processes of a run write what they print."""

from __future__ import annotations

from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs

from pipeoptim.train.layout import Layout


class StageLogs(LogsSpecs):
    """``<folder>/stage-<k>.out`` and ``.err``; only the last stage writes to the terminal (its progress bar)."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        super().__init__(log_dir=str(folder))
        self.folder, self.layout = folder, layout

    @property
    def root_log_dir(self) -> str:
        """Where they are."""
        return str(self.folder)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """File names for the processes whose environments are ``envs``."""
        self.folder.mkdir(parents=True, exist_ok=True)
        outs = {rank: self._path(rank, "out") for rank in envs}
        outs[self.layout.reporter] = ""
        errors = {rank: self._path(rank, "error.json") for rank in envs}
        for rank, env in envs.items():
            env["TORCHELASTIC_ERROR_FILE"] = errors[rank]
        return LogsDest(stdouts=outs, stderrs={rank: self.err(rank) for rank in envs}, error_files=errors)

    def err(self, rank: int) -> str:
        """What a process writes to stderr."""
        return self._path(rank, "err")

    def _path(self, rank: int, kind: str) -> str:
        replica, stages = self.layout.place(rank)
        of = f"-replica-{replica}" if self.layout.replicas > 1 else ""
        return str(self.folder / f"stage-{'-'.join(map(str, stages))}{of}.{kind}")
