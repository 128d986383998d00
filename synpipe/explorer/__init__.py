"""The explorer: similar synapses and the map, in the browser.

The server answers from a store; an exported site answers from files alone. Both have the same pages.

- `server`: HTTP addresses, and the server itself
- `answers`: reads the answers from the store, as plain values
- `map_file`: the map as a binary file for the browser
- `uploads`: turns an uploaded PNG into a tile
- `site`: exports the explorer as a static site
- `quantised`: the vectors of a static site, with one byte per component
- `column_files`: the data files of a static site
- `tile_packs`: the tiles of a static site
- `static/`: the pages, without a build step; `static/vendor/` holds the one library that they use
"""
