"""Every workload by its name."""

from . import workloads, workloads_continuous, workloads_topics

WORKLOADS = {**workloads.WORKLOADS, **workloads_continuous.WORKLOADS, **workloads_topics.WORKLOADS}
