"""Tables."""


def write_tables(rows: list[dict]) -> None:
    pass
