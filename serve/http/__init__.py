"""An HTTP server for an engine, with the API of OpenAI; needs the extra `serve`. Begin with `app.py`."""
