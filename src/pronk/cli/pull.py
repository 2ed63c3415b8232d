"""`pronk pull`: gets a model onto this machine."""

import click

from pronk.cli.common import (
    emit,
    human_bytes,
    json_option,
    model_is_called,
    ref_of,
    show_terms_once,
    text,
)
from pronk.cli.progress import Reporter


@click.command()
@click.argument("name", type=text)
@json_option
@model_is_called("NAME")
def pull(name: str, as_json: bool) -> None:
    """Download a model, verified, into the cache.

    NAME is a catalog name or a Hugging Face id; OWNER/NAME:PART picks the GGUF file with PART in
    its name. What is there already is not fetched again. Models are kept in ~/.cache/pronk (under
    XDG_CACHE_HOME where that is set), those of Hugging Face in its own cache (HF_HOME).
    """
    from pronk.checkpoints import pull as fetching
    from pronk.checkpoints.catalog import licence_by_name

    ref = ref_of(name)
    with Reporter() as progress:
        model = fetching.pull(ref, progress=progress)
    show_terms_once(licence_by_name(model.licence))
    if as_json:
        emit(
            {
                "name": model.name,
                "path": str(model.path),
                "bytes": model.nbytes,
                "source": model.source,
                "licence": model.licence or None,
            }
        )
    else:
        click.echo(f"{model.name}  {human_bytes(model.nbytes)}  {model.path}")
