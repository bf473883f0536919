"""``echostream serve``: many live streams from one process, over WebSockets. Imports point from the top to the bottom.

``command``     the command line: flags, TLS, signals
``app``         the ASGI application: routes, admission, page, health and metrics
``realtime``    OpenAI's realtime translation dialect, with our extensions; ``simulstream``: that package's protocol
``hub``         who is connected to which stream, what it has not got yet, and what is archived
``engine``      the thread that steps all streams together, row by row of one batch (``rows``)
``limits``      what a client may do; ``metrics``: what is counted
"""
