"""Reasons are unique and survive a wire."""

from cluster import errors


def test_every_reason_comes_back_as_its_own_class():
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.ClusterError)]
    concrete = [c for c in classes if c is not errors.ClusterError]
    assert len({c.reason for c in concrete}) == len(concrete) >= 15
    for cls in concrete:
        error = errors.error_from_reason(cls.reason, "m", field="f", retry_after_s=1.5)
        assert type(error) is cls
        assert (str(error), error.message, error.field, error.retry_after_s) == ("m", "m", "f", 1.5)


def test_an_unknown_reason_is_still_an_error():
    assert type(errors.error_from_reason("FROM_THE_FUTURE", "m")) is errors.ClusterError


def test_a_subclass_without_a_reason_of_its_own_comes_back_as_its_parent():
    class LostInSpace(errors.EngineFault):
        def __init__(self, message: str, planet: str) -> None:
            super().__init__(f"{message} near {planet}")

    assert type(errors.error_from_reason(LostInSpace("lost", "Mars").reason, "m")) is errors.EngineFault
