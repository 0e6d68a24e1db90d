"""The `dmtg` command."""
def main() -> None:
    """Run."""
