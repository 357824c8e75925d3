"""TensorBoard: an event file in the run directory, which `tensorboard --logdir runs` shows."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from gpt.tracking.follower import TrackedRun, Values, to_json

PREFIX = "events.out.tfevents."  # of an event file's name, by which TensorBoard finds it


class TensorBoard:
    """An event file with all steps; the run's earlier event files are emptied.

    A record is written with TensorBoard's own `RecordWriter` and not with its `EventFileWriter`,
    whose thread would print a traceback if the disk is full. The time of a step is when the run was
    first tracked plus the seconds that its updates took, also if it is written again later.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, run: TrackedRun) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.summary.writer.record_writer import RecordWriter

        for old in run.directory.glob(f"{PREFIX}*"):
            old.unlink()
            old.touch()  # a TensorBoard that is reading it would wait for a missing file
        path = run.directory / f"{PREFIX}{time.time_ns()}.{run.name}"
        self._file = path.open("xb")
        self._records = RecordWriter(self._file)
        self.now = run.identity.started
        self._add(Event(file_version="brain.Event:2"))
        # A TensorBoard that is running drops what it has read from the files emptied above.
        self._add(Event(session_log=SessionLog(status=SessionLog.START)))
        hparams = hparams_pb(run.describe_flat(), run.name, self.now)
        self._add(Event(summary=hparams))
        self._add_text("config", run.config.to_yaml())
        self._add_text("directory", str(run.directory.absolute()))

    def log(self, step: int, values: Values) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        self.now += values.get("train/step_seconds", 0.0)
        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._add(Event(step=step, summary=Summary(value=scalars)))

    def finish(self, result: dict[str, Any] | None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

        if result is not None:
            self._add_text("result", to_json(result))
            finished = result["status"] == "finished"
            end = plugin_data_pb2.SessionEndInfo(
                status=api_pb2.STATUS_SUCCESS if finished else api_pb2.STATUS_FAILURE,
                end_time_secs=self.now,
            )
            data = plugin_data_pb2.HParamsPluginData(session_end_info=end)
            value = Summary.Value(
                tag=metadata.SESSION_END_INFO_TAG,
                metadata=metadata.create_summary_metadata(data),
                tensor=metadata.NULL_TENSOR,
            )
            self._add(Event(summary=Summary(value=[value])))
        self._file.close()

    def _add_text(self, tag: str, text: str) -> None:
        """Show `text`, unchanged, on the Text page."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.types_pb2 import DT_STRING
        from tensorboard.plugins.text.metadata import create_summary_metadata

        markdown = "".join(f"    {line}\n" for line in text.splitlines())
        tensor = TensorProto(dtype=DT_STRING, string_val=[markdown.encode()])
        metadata = create_summary_metadata(None, "")
        value = Summary.Value(tag=tag, metadata=metadata, tensor=tensor)
        self._add(Event(summary=Summary(value=[value])))

    def _add(self, event: Any) -> None:
        """Append an event; after a failure, close the file."""
        event.wall_time = self.now
        try:
            self._records.write(event.SerializeToString())
            self._file.flush()
        except OSError:
            with contextlib.suppress(OSError):
                self._file.close()
            raise
