"""The trajectory log: every command and result, durable before it is answered, so that a program can be run again."""

from dsec.trajectory.log import TrajectoryLog
from dsec.trajectory.replay import NOT_STARTED, Live, Replay, Trajectory
from dsec.trajectory.segment import LogCorrupt, LogFailed, LogFull

__all__ = ["NOT_STARTED", "Live", "LogCorrupt", "LogFailed", "LogFull", "Replay", "Trajectory", "TrajectoryLog"]
