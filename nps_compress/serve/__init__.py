"""An HTTP server for many fine-tunes of one base, in the shape of OpenAI's API."""
