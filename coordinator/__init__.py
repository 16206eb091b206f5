"""Program A: enrols participants, schedules rounds, fuses what arrives into the pivot."""
