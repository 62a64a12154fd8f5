"""`mb pki`: the authority of a fleet and the certificates it signs."""

from mb.cli import LazyGroup

command = LazyGroup(
    "pki",
    verbs={
        "init": ("mb.commands.pki_init", "Make a new authority."),
        "issue": ("mb.commands.pki_issue", "Issue a certificate."),
        "revoke": ("mb.commands.pki_revoke", "Withdraw a certificate."),
        "publish": ("mb.commands.pki_publish", "Tell the fleet what is withdrawn."),
        "show": ("mb.commands.pki_show", "Show what a certificate says."),
    },
    help="The certificate authority of a fleet. All but publish only read and write files.",
)
