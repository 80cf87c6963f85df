"""Repositories that Bazel 4 would download for rules that it has itself: made here, so that a build needs no network."""

def _native_rules(context):
    defs = ["%s = native.%s" % (rule, rule) for rule in context.attr.rules]
    context.file("BUILD")
    context.file(context.attr.language + "/BUILD")
    context.file(context.attr.language + "/defs.bzl", "\n".join(defs) + "\n")

native_rules = repository_rule(
    implementation = _native_rules,
    attrs = {
        "language": attr.string(mandatory = True),
        "rules": attr.string_list(mandatory = True),
    },
    doc = "A repository whose //language:defs.bzl gives these native rules under their own names.",
)
