"""A machine as reports of measurements name it."""

MACHINE = {
    "cpu": "a processor",
    "vector_instructions": "AVX2",
    "cores": 4,
    "compiler": "a compiler",
    "date": "2020-02-02T02:02:02+00:00",
    "versions": {"torch": "2.13.0"},
}
