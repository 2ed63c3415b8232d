"""`pronk rm`: removes a fetched model from the disk."""

import click

from pronk.cli.common import emit, human_bytes, json_option, ref_of, text


@click.command()
@click.argument("name", type=text)
@json_option
def rm(name: str, as_json: bool) -> None:
    """Remove a model that `pull` fetched.

    A Hugging Face model leaves the Hugging Face cache as well, where other programs may use it.
    """
    from pronk.checkpoints import pull as fetching

    ref = ref_of(name)
    freed = fetching.remove(ref)
    if as_json:
        emit({"name": ref.name, "freed_bytes": freed})
    else:
        click.echo(f"removed {ref.name}, {human_bytes(freed)} free again")
