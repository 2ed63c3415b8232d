"""Chooses the backend of a run, once, and says why."""

from types import ModuleType

from pronk.core.errors import UserError

BACKENDS = ("auto", "cpu", "reference")


def select_backend(name: str = "auto") -> ModuleType:
    """The module of a backend: "cpu" (compiled kernels), "reference" (NumPy), or "auto", which is
    the first of them that is there. Raises UserError for another name or a core that is missing."""
    if name not in BACKENDS:
        raise UserError(f"backend: unknown name {name!r}; choose one of {', '.join(BACKENDS)}")
    if name in ("auto", "cpu"):
        try:
            from pronk.backends import cpu
        except ImportError as error:
            if name == "cpu":
                why = "is not there" if "'_cpu'" in str(error) else f"cannot be loaded ({error})"
                raise UserError(
                    f"backend: 'cpu' needs the compiled core, which {why};"
                    " reinstall with a C++ compiler or choose 'reference'"
                ) from None
        else:
            _check_isa(cpu)
            return cpu
    from pronk.backends import reference

    return reference


def _check_isa(cpu: ModuleType) -> None:
    """The first question to the core makes it choose its instruction set."""
    try:
        cpu.isa()
    except RuntimeError as error:  # PRONK_ISA names one that is unknown or not there
        raise UserError(str(error)) from None
