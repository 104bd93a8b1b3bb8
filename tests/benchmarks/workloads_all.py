"""Every workload by its name."""

from . import workloads, workloads_continuous

WORKLOADS = {**workloads.WORKLOADS, **workloads_continuous.WORKLOADS}
