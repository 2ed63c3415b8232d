"""`pronk rm`: removes a fetched model from the disk."""

import click

from pronk.cli.common import emit, human_bytes, json_option, model_is_called, ref_of, text
from pronk.cli.progress import Reporter


@click.command()
@click.argument("name", type=text)
@json_option
@model_is_called("NAME")
def rm(name: str, as_json: bool) -> None:
    """Remove a model that `pull` fetched.

    A Hugging Face model leaves the Hugging Face cache as well, where other programs may use it;
    what another program put there stays.
    """
    from pronk.checkpoints import pull as fetching

    ref = ref_of(name)
    with Reporter() as progress:
        freed = fetching.remove(ref, progress=progress)
    if as_json:
        emit({"name": ref.name, "freed_bytes": freed})
    else:
        click.echo(f"removed {ref.name}, {human_bytes(freed)} free again")
