"""push: a bundle to the hub."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from pocketmoe.console.numbers import PATH
from pocketmoe.console.options import complete_bundles, examples
from pocketmoe.console.progress import ProgressBar
from pocketmoe.sizes import in_words


@click.command(
    epilog=examples(
        "pocketmoe push SMALL someone/olmoe-int4 --private",
        "pocketmoe push SMALL someone/olmoe --revision int4",
    )
)
@click.argument("bundle", type=PATH, shell_complete=complete_bundles)
@click.argument("repository", metavar="ORG/NAME")
@click.option("--private", is_flag=True, help="Only those whom its owner lets in see it; refused where it is public.")
@click.option("--revision", metavar="BRANCH", help="A branch of the repository. Default: its main one.")
def push(bundle: Path, repository: str, private: bool, revision: str | None) -> None:
    """Upload BUNDLE to the Hugging Face hub.

    As ORG/NAME, which is made where it is not there, in one commit. Sent are the manifest, the files that it names, and
    a README.md made of the model card: no packed experts, nothing else that lies there. Large files that a broken
    upload has sent are not sent again. The hub knows you by `hf auth login` or HF_TOKEN.
    """
    from pocketmoe.errors import BadInput
    from pocketmoe.hub.client import Reference
    from pocketmoe.hub.push import push as push_bundle

    reference = Reference.parse(f"{repository}@{revision}" if revision is not None else repository)
    if reference is None or (revision is None and reference.revision):
        raise BadInput(f"{repository} is no place on the hub", "Name it ORG/NAME, and a branch by --revision.")
    with ProgressBar() as bar:
        done = push_bundle(bundle, reference, private=private, shows_bars=sys.stderr.isatty(), progress=bar)
    kind = "private" if done.private else "public"
    click.echo(f"Pushed {done.files} files, {in_words(done.nbytes)} ({kind}, commit {done.commit[:12]}).", err=True)
    click.echo(done.url)
