"""Pictures and pages shared by quality pages and the report: plain values in, SVG and HTML out."""
