"""The explorer: similar synapses and the map, in the browser.

`answers` asks the store and knows nothing of HTTP, `uploads` reads what a browser sends, `app` is the server, `static` holds
the pages.
"""
