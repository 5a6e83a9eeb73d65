"""One HTML page of what runs left behind: read, drawn as SVG, filled into a template."""
