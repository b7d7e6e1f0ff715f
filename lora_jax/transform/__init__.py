"""The transform: functions of parameters as functions of (base, delta)."""
