"""The drawing step of every figure: a DataFrame in, an Altair chart out, tested on its encodings. One module a page.

Fields have fixed names and everything that comes from a run (names, benchmarks) is data or plain text, so nothing that
somebody wrote into a run file is ever read as part of a chart. Charts have no width of their own unless they are made
of several views.
"""
