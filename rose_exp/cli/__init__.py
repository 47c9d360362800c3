"""The commands ``rose-exp`` and ``rose-exp-report``."""
