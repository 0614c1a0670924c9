"""The Hugging Face hub's refusals, said in forebay's words."""

from collections.abc import Iterator
from contextlib import contextmanager

from .errors import ModelError


@contextmanager
def hub_refusals(source: str, revision: str | None, refusal: type[ValueError] = ModelError) -> Iterator[None]:
    """Turn what huggingface_hub raises in this context, about the repository `source`, into `refusal`, with what to
    do.
    """
    try:
        from huggingface_hub import errors
    except ImportError as error:
        raise refusal(f"{source!r} is read from the hub with huggingface_hub: pip install huggingface_hub") from error
    at = f"{source} at revision {revision}" if revision else source
    try:
        yield
    except errors.GatedRepoError as error:
        raise refusal(
            f"{at} is gated: accept its terms at https://huggingface.co/{source}, then log in with 'hf auth login' or "
            "set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise refusal(f"{source} has no revision {revision!r} on the hub") from error
    except errors.RepositoryNotFoundError as error:
        raise refusal(
            f"the hub has no model {source!r}, or it is private: check the spelling, or log in with 'hf auth login' or "
            "set HF_TOKEN"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise refusal(
            f"{at} is not in the local cache and the hub cannot be reached: fetch it where there is a network with "
            f"'hf download {source}', or name a local folder"
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        raise refusal(f"{at} cannot be fetched from the hub: {error}") from error
