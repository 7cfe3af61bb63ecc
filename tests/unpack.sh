# SPDX-License-Identifier: MIT
# shellcheck shell=bash disable=SC2154
#
# Programs that the machine lacks, from Debian's archive, with the mirror, the proxy and the keys that the machine's own apt is set
# up with; nothing is installed. To be sourced by a bash script that has set `store`, the directory below which everything goes, and
# has a function `skip MESSAGE`, which doesn't return.

debian_ready=

# Prints `URI<tab>SUITE<tab>COMPONENTS<tab>OPTIONS` for each archive that the machine's apt knows, options in the one-line style.
apt_sources() {
    local file
    for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
        [[ -r $file ]] || continue
        sed -n 's/#.*//; s/^[[:space:]]*deb[[:space:]][[:space:]]*//p' "$file" | awk '
            {
                options = ""
                if (sub(/^\[/, "")) {
                    options = $0; sub(/\].*/, "", options)
                    sub(/^[^]]*\][ \t]*/, "")
                }
                components = ""
                for (i = 3; i <= NF; i++) components = components " " $i
                print $1 "\t" $2 "\t" components " \t" options
            }'
    done
    for file in /etc/apt/sources.list.d/*.sources; do
        [[ -r $file ]] || continue
        awk '
            function flush(   u, s, i, k, options) {
                if (value["types"] ~ /(^| )deb( |$)/ && value["enabled"] !~ /^ *no/) {
                    # A key inside the stanza is no file name: apt then looks among the keys it trusts.
                    if (value["signed-by"] ~ /^ *\/[^ ]*$/) { options = value["signed-by"]; sub(/^ */, "signed-by=", options) }
                    if (value["trusted"] ~ /yes/) options = options " trusted=yes"
                    split(value["uris"], u, " "); split(value["suites"], s, " ")
                    for (i = 1; i in u; i++) for (k = 1; k in s; k++)
                        print u[i] "\t" s[k] "\t " value["components"] " \t" options
                }
                split("", value)
            }
            /^#/ { next }
            /^[ \t]*$/ { flush(); next }
            /^[ \t]/ { value[name] = value[name] " " $0; next }
            { name = tolower($0); sub(/:.*/, "", name); text = $0; sub(/^[^:]*:[ \t]*/, "", text); value[name] = text }
            END { flush() }' "$file"
    done
}

# apt with a package database of its own, in which nothing is installed: no root, no lock and no trace on the machine.
debian_apt() {
    local tool=$1
    shift
    "$tool" -c "$store/apt/apt.conf" "$@"
}

debian_setup() {
    [[ -z $debian_ready ]] || return 0
    local release='' codename='' source uri options
    if [[ -r /etc/os-release ]]; then
        release=$(. /etc/os-release && echo "${ID:-}")
        codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    fi
    if [[ $release != debian ]] || ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
        skip "not found here, and only a Debian machine can fetch it"
    fi

    # Debian's own archive is the one that carries the machine's release in a component main.
    source=$(apt_sources | awk -F'\t' -v codename="$codename" '$2 == codename && $3 ~ / main / { print; exit }')
    [[ -n $source ]] ||
        source=$(apt_sources | awk -F'\t' '$2 !~ /security/ && $3 ~ / main / && $1 ~ /debian\/?$/ { print; exit }')
    [[ -n $source ]] || skip "no Debian archive in this machine's apt sources"
    uri=$(cut -f1 <<<"$source")
    options=$(cut -f4 <<<"$source")

    rm -rf "$store/apt"
    mkdir -p "$store/apt/state/lists/partial" "$store/apt/cache/archives/partial"
    : >"$store/apt/status"
    cat >"$store/apt/sources.list" <<END
deb [$options arch=amd64] $uri trixie main
deb [$options arch=amd64] $uri trixie-backports main
END
    # The machine's own hooks are for its own package database.
    cat >"$store/apt/apt.conf" <<END
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear Acquire::IndexTargets::deb::DEP-11;
Dir::State "$store/apt/state";
Dir::State::status "$store/apt/status";
Dir::Cache "$store/apt/cache";
Dir::Etc::sourcelist "$store/apt/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
APT::Architecture "amd64";
APT::Architectures "amd64";
APT::Default-Release "trixie";
APT::Install-Recommends "false";
APT::Sandbox::User "";
APT::Update::Error-Mode "any";
Acquire::Languages "none";
Acquire::Retries "3";
END
    echo "# reading the package lists of Debian trixie and trixie-backports"
    debian_apt apt-get -qq update || skip "the package lists could not be fetched"
    debian_ready=1
}

# unpack DIRECTORY DEB...: all or nothing.
unpack() {
    local directory=$1 package
    shift
    rm -rf "$directory" "$directory.new"
    mkdir -p "$directory.new"
    for package in "$@"; do
        dpkg-deb -x "$package" "$directory.new"
    done
    mv "$directory.new" "$directory"
}
