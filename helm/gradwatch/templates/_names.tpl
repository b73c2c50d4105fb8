{{/* The chart's name, as the recommended labels have it. */}}
{{- define "gradwatch.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* The objects' name: the release's, with the chart's where it does not say it already. */}}
{{- define "gradwatch.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 48 | trimSuffix "-" -}}
{{- else -}}
{{- $name := include "gradwatch.name" . -}}
{{- ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) | trunc 48 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "gradwatch.bridgeName" -}}
{{ include "gradwatch.fullname" . }}-bridge
{{- end -}}

{{- define "gradwatch.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "gradwatch.bridgeName" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* Labels that never change over a release's life: a Deployment's selector is immutable, so no version here. */}}
{{- define "gradwatch.selectorLabels" -}}
app.kubernetes.io/name: {{ include "gradwatch.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: bridge
{{- end -}}

{{/* The recommended labels of an object that is no part of the bridge. */}}
{{- define "gradwatch.sharedLabels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/name: {{ include "gradwatch.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: gradwatch
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* The recommended labels of the bridge's objects. */}}
{{- define "gradwatch.bridgeLabels" -}}
{{ include "gradwatch.sharedLabels" . }}
app.kubernetes.io/component: bridge
{{- end -}}

{{/* An image by digest, else by tag, else by the chart's version. Takes a dict: image, version. */}}
{{- define "gradwatch.image" -}}
{{- if .image.digest -}}
{{ .image.repository }}@{{ .image.digest }}
{{- else -}}
{{ .image.repository }}:{{ default .version .image.tag }}
{{- end -}}
{{- end -}}
