"""What users bring: a table of questions and a folder of pictures. Knows no model, needs no torch.

Table: `table_reader` (CSV to `table.Table`), `columns` (which holds what), `csv_reader` (encoding, delimiter, records),
`table_formats` (tables that are not CSV), `table_warnings` (values that another program has changed).
Finding: `picture_folder` (whose fault is a failure), `picture_paths` (name to file), `similar_names` (hints).
Decoding: `decode` (file to RGB image), `decode_options`, `picture_limits` (too large, truncated), `file_kinds` (no
picture), `pixel_formats` with `jpeg` and `tiff` (not known to be decoded right).
At speed: `read_ahead` (threads), `decode_pool` and `decode_worker` (processes, which a decoder may crash).
"""
