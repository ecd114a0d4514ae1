#!/bin/bash
# The files of an arm64 board: Debian's smallest arm64 system with Python, numpy and ONNX Runtime, unpacked, not set up.
#
#   arm_root.sh DIR PIP     make it in DIR, unless it is whole there already. PIP: the command that downloads wheels
#
# Its programs run through qemu-user, which the kernel starts by itself for them (binfmt_misc, with the F flag, so that
# no file of this machine is needed inside). About 350 times slower than this machine: good for what it does, no timing.
# Needs root, debootstrap and qemu-user-static.
set -euo pipefail

dir=$1
pip=$2
[ ! -e "$dir/whole" ] || exit 0
rm -rf "$dir"
mkdir -p "$dir/root" "$dir/wheels"
root=$dir/root
mirror=$(sed -n 's/^URIs: *//p' /etc/apt/sources.list.d/*.sources 2>/dev/null | head -1)
mirror=${mirror:-$(sed -n 's/^deb \(\[[^]]*\] \)\?\([^ ]*\) .*/\2/p' /etc/apt/sources.list | head -1)}
debootstrap --arch=arm64 --download-only --variant=minbase \
  --include=python3-minimal,libpython3.11-stdlib,libgomp1,libstdc++6,procps bookworm "$dir/packages" "$mirror" >"$dir/log" 2>&1
for package in "$dir"/packages/var/cache/apt/archives/*.deb; do
  dpkg-deb -x "$package" "$root"
done
mkdir -p "$root"/{proc,sys,dev,tmp,run/lock,etc,home,opt/site}
chmod 1777 "$root/tmp" "$root/run/lock"
touch "$root/etc/passwd" "$root/etc/group"
ln -sfn python3.11 "$root/usr/bin/python3"
for platform in manylinux_2_28 manylinux_2_27; do
  platforms+=(--platform "${platform}_aarch64")
done
"$pip" download --quiet --no-deps --dest "$dir/wheels" --python-version 3.11 --implementation cp --abi cp311 \
  --only-binary=:all: "${platforms[@]}" onnxruntime numpy >>"$dir/log" 2>&1
for wheel in "$dir"/wheels/*.whl; do
  python3 -m zipfile -e "$wheel" "$root/opt/site"
done
# with this machine's processor in /proc/cpuinfo, ONNX Runtime's library for it ends with a fault
for core in 0 1; do
  printf 'processor\t: %s\nBogoMIPS\t: 62.50\nFeatures\t: %s\n' "$core" \
    'fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp'
  printf 'CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: 0xd42\nCPU revision\t: 1\n\n'
done >"$dir/cpuinfo"
mountpoint -q /proc/sys/fs/binfmt_misc || mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
[ -e /proc/sys/fs/binfmt_misc/qemu-aarch64 ] ||
  cat /usr/lib/binfmt.d/qemu-aarch64.conf >/proc/sys/fs/binfmt_misc/register
chroot "$root" /usr/bin/python3 -c 'import json' # so far as to start
rm -rf "$dir/packages" "$dir/wheels"
touch "$dir/whole"
