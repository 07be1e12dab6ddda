"""The errors this package raises. Each message says what is wrong and what to do."""


class KVStoreError(Exception):
    """Base of every error that KVStore raises on purpose."""


class ConfigError(KVStoreError, ValueError):
    """A configuration value is missing, unknown or out of range."""


class NotNow(ConfigError):
    """What is configured cannot be had now, but perhaps later: memory, a port, a lock."""


class NoPackage(ConfigError):
    """A package that something needs is not installed, or must not be used."""


def missing(what: str, extra: str, e: ImportError) -> NoPackage:
    """What to raise where `what` cannot be imported; `extra` of kvstore brings its packages."""
    return NoPackage(
        f"{what} needs a package that is not installed ({e}): pip install 'kvstore[{extra}]'"
    )


class SpecError(KVStoreError, ValueError):
    """A model identity, group, layout, shard or block description is not valid."""


class ProtocolError(KVStoreError):
    """The other side of a connection sent something it must not send."""


class StoreUnavailable(KVStoreError, ConnectionError):
    """The daemon cannot be reached, refused the session, or did not answer in time."""


class DeviceUnavailable(StoreUnavailable):
    """An accelerator or its driver cannot be used, or refused a call."""


class TierUnavailable(KVStoreError, OSError):
    """A tier's medium cannot be used now; the store goes on without it."""


class FormatError(KVStoreError):
    """A file of ours has an unknown version, or is not ours, or is damaged beyond its records."""


class AccessDenied(KVStoreError, PermissionError):
    """A token is missing, unknown, or does not allow what was asked."""
