"""Start, stop and find engine processes, wait for a device, run other model work: what the dashboard and the command
line share. Nothing here imports torch, SMAC or Streamlit: starting something stays quick and small."""

from gptailor.launch.devices import Device, device_of, devices_of, free_devices, n_cores, places
from gptailor.launch.engine import (
    LOST,
    EngineLock,
    StopResult,
    asked,
    delete_run,
    is_alive,
    launch,
    prepare,
    read_control,
    request,
    resume,
    start,
    state,
    stop,
)
from gptailor.launch.jobs import Job, JobState, JobStatus, job_state, list_jobs, start_job, stop_job
from gptailor.launch.queue import DeviceQueue, StopAsked, waiting_behind
from gptailor.launch.supervisor import DEATHS, DEATHS_AT_A_TRIAL, START_ME_AGAIN, is_child, supervise

__all__ = [
    "DEATHS",
    "DEATHS_AT_A_TRIAL",
    "LOST",
    "START_ME_AGAIN",
    "Device",
    "DeviceQueue",
    "EngineLock",
    "Job",
    "JobState",
    "JobStatus",
    "StopAsked",
    "StopResult",
    "asked",
    "delete_run",
    "device_of",
    "devices_of",
    "free_devices",
    "is_alive",
    "is_child",
    "job_state",
    "launch",
    "list_jobs",
    "n_cores",
    "places",
    "prepare",
    "read_control",
    "request",
    "resume",
    "start",
    "start_job",
    "state",
    "stop",
    "stop_job",
    "supervise",
    "waiting_behind",
]
