"""The names of the policy's time spans on the bus, in files and on command lines."""

from __future__ import annotations

from dataclasses import fields

from qkilld.model.policy import JOB_SPANS, SPANS, Policy, Span


def test_every_field_of_the_policy_is_in_the_table() -> None:
    assert [span.field for span in SPANS] == [field.name for field in fields(Policy)]


def test_the_names_of_a_span() -> None:
    span = Span("storage_stall", "")
    assert span.key == "StorageStallSec"
    assert span.bus_property == "StorageStallUSec"
    assert span.bus_option == "storage-stall-usec"
    assert span.argument == "--storage-stall"
    assert SPANS[-1].argument == "--powerdown-sec"  # --powerdown is a switch.


def test_where_a_span_can_be_given() -> None:
    """These names are part of the interface, so they must not change."""
    assert [span.bus_property for span in SPANS] == [
        "GraceUSec",
        "StallUSec",
        "StorageStallUSec",
        "MaxUSec",
        "ReapUSec",
        "PowerdownUSec",
    ]
    assert [span.bus_option for span in JOB_SPANS] == [
        "grace-usec",
        "stall-usec",
        "storage-stall-usec",
        "max-usec",
        "powerdown-usec",
    ]
