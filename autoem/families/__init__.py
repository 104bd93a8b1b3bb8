"""The family table: one record a distribution serves the E-step and the M-step (a group of families a file)."""

from autoem.families import continuous, discrete, laplace, normal, opaque  # noqa: F401  (registration)
from autoem.families._family import (
    Args,
    Counting,
    Covariance,
    Direction,
    Family,
    Location,
    Median,
    NoClosedForm,
    Opaque,
    Power,
    Rule,
    family_of,
    register_family,
    registered_families,
)

__all__ = [
    "Args",
    "Counting",
    "Covariance",
    "Direction",
    "Family",
    "Location",
    "Median",
    "NoClosedForm",
    "Opaque",
    "Power",
    "Rule",
    "family_of",
    "register_family",
    "registered_families",
]
