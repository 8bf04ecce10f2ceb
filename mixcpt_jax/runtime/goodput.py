"""Goodput in Google Cloud: the activities of `timing`, for `ml-goodput-measurement`.

The package's recorder writes to Cloud Logging and nowhere else; its calculator reads them
there. Without Google Cloud, `timing.jsonl` has the same activities.
"""

import datetime

# Activities that the package calls by other names; each of the rest is a custom event.
_RECORDS = {"starting": "training_preparation", "data": "data_loading"}
_CUSTOM = ("restoring", "evaluation", "saving")


class Recorder:
    """Follows a `timing.Timing` and writes where its activities begin and end."""

    def __init__(self, job: str):
        """
        Args:
          job: the name of the run in Google Cloud; an interrupted run keeps it.
        """
        from ml_goodput_measurement import goodput  # an optional package

        self._recorder = goodput.GoodputRecorder(
            job, f"goodput_{job}", logging_enabled=True
        )
        self._recorder.record_job_start_time(_now())
        self._record("starting", "start")

    def enter(self, before: str, after: str) -> None:
        """Records the end of one activity and the start of the next."""
        if before != after:
            self._record(before, "end")
            self._record(after, "start")

    def step(self, step: int) -> None:
        """Records that a step starts."""
        self._recorder.record_step_start_time(step, _now())

    def finish(self) -> None:
        """Records the end of the run, and waits until all records are written."""
        self._recorder.record_job_end_time(_now())
        self._recorder.flush()

    def _record(self, activity: str, edge: str) -> None:
        if activity in _RECORDS:
            name = f"record_{_RECORDS[activity]}_{edge}_time"
            getattr(self._recorder, name)(_now())
        elif activity in _CUSTOM:
            name = f"record_custom_badput_event_{edge}_time"
            getattr(self._recorder, name)(_now(), activity)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
