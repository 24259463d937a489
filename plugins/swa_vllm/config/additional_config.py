"""The ``swa`` section of vLLM's ``--additional-config``, read without vLLM."""

from collections.abc import Mapping

from swa_backend.options import OPTION_KEYS, USE_OPTIONS, SWAConfigError, SWAOptions, is_section

# Of these no other plugin is known: found beside "swa", they were meant to be in it.
_OURS_ALONE = frozenset(OPTION_KEYS) - {"enabled", "impl"}


def parse_additional_config(additional: object) -> SWAOptions:
    """Validate what vLLM has as ``--additional-config``: its ``swa`` section, if any.

    Raises:
        SWAConfigError: as :meth:`SWAOptions.from_dict`; options that are not inside ``swa``.
    """
    if not isinstance(additional, Mapping):
        return SWAOptions()
    for key in map(str, additional):
        if key in _OURS_ALONE or (is_section(key) and key != "swa"):
            raise SWAConfigError(
                f"--additional-config has {key!r} where nothing reads it; options of windows "
                f'belong into an object "swa". Write {USE_OPTIONS}'
            )
    return SWAOptions.from_dict(additional.get("swa", {}))
